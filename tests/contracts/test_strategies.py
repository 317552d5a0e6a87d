"""What every strategy of the table must hold, whatever it does; a new one joins by a row of parameters below."""

from __future__ import annotations

import math
import pickle
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.aggregate import AGGREGATORS
from fedsim.clients.byzantine import InnerProduct
from fedsim.config import named
from fedsim.fleet import Fleet
from fedsim.optim import build
from fedsim.sim.byzantine import Byzantine
from fedsim.strategies import STRATEGIES
from fedsim.strategies.selection import SELECTIONS
from fedsim.topology import TOPOLOGIES
from tests.build import Clocks, Play, Rows, drawn, f_80, local_sgd, quadratic, rows_of, watched

ROBUST = {"aggregator": "median", "server_optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.5}}
ROWS: dict[str, dict[str, Any]] = {
    "centralised": {},
    "fedavg": {"cohort_size": 4},
    "scaffold": {"cohort_size": 4},
    "fedavg_m": {"cohort_size": 4, "beta": 0.5},
    "scaffold_m": {"cohort_size": 4, "beta": 0.5},
    "fedavg_m_vr": {"cohort_size": 4, "beta": 0.5},
    "scaffold_m_vr": {"cohort_size": 4, "beta": 0.5},
    "fedbn": {"cohort_size": 4, "personal": ["1.bias"]},
    "fedper": {"cohort_size": 4, "personal": ["1.bias"]},
    "mime": {"cohort_size": 4},
    "mime_lite": {"cohort_size": 4},
    "fedrep": {"cohort_size": 4, "personal": ["1.bias"], "head_epochs": 2},
    "ditto": {"cohort_size": 4, "lam": 0.5},
    "pfedme": {"cohort_size": 4, "lam": 5.0, "inner_steps": 3, "inner_lr": 0.1},
    "apfl": {"cohort_size": 4, "adaptive": True},
    "fedcm": {"cohort_size": 4, "alpha": 0.5},
    "fedprox": {"cohort_size": 4, "mu": 0.3},
    "feddyn": {"cohort_size": 4, "alpha": 0.5},
    "fednova": {"cohort_size": 4, "mu": 0.3},
    "stem": {"a": 0.3},
    "mb_storm": {"cohort_size": 4, "beta": 0.5},
    "async_fedavg": {},
    "async_fedavg, observed": {"weights": "observed"},
    "fedasync": {"alpha": 0.6, "a": 0.1},
    "fedfix": {"interval": 0.35},
    "fedbuff": {"buffer_size": 2},
    "fedbuff_stream": {"buffer_size": 2, "concurrency": 4},
    "dsgd": {},
    "monna": {"beta": 0.5, "f": 1, "arrival": "adversarial"},
    "ef21": {"cohort_size": 4},
    "ef21_bc": {},
    "diana": {"cohort_size": 4},
    "marina": {"p": 0.4},
    "gradient_tracking": {},
    "clipped_gossip": {"beta": 0.5, "f": 1, "topology": "ring"},
    "bridge": {"aggregator": "median", "topology": "torus"},
    "dsgd, redrawn and absent": {"topology": {"name": "random_regular", "degree": 3, "redraw": 2}},
    "gradient_tracking, absent": {"topology": "torus"},
    "monna, torus": {"beta": 0.5, "f": 1, "topology": "torus"},
    "extragradient": {"lr": 0.1},
    "optimistic_gradient": {"lr": 0.1},
    "masha1": {"lr": 0.1, "p": 0.4},
    "masha2": {"lr": 0.1, "p": 0.4, "batch_size": 8},
    "uncoded": {"lr": 0.3},
    "gradient_coding": {"lr": 0.3, "s": 2},
    "sr_sgc": {"lr": 0.3, "B": 1, "W": 2, "lam": 3},
    "m_sgc": {"lr": 0.3, "B": 1, "W": 2, "lam": 2},
    "fedavg, absent": {"cohort_size": 4},
    "fedavg_m, late": {"cohort_size": 4, "beta": 0.5, "deadline": 0.75, "late": "keep"},
    "scaffold, late": {"cohort_size": 4, "deadline": 0.75, "late": "keep"},
    "fedfix, absent": {"interval": 0.35},
    "fedbuff, absent": {"buffer_size": 2},
    "fedbuff_stream, absent": {"buffer_size": 2, "concurrency": 4},
    "fedper, robust": {"cohort_size": 4, "personal": ["1.bias"], **ROBUST},
    "scaffold, robust": {"cohort_size": 4, **ROBUST},
    "scaffold_m, robust": {"cohort_size": 4, "beta": 0.5, **ROBUST},
    "fedavg_m_vr, robust": {"cohort_size": 4, "beta": 0.5, **ROBUST},
    "mime, robust": {"cohort_size": 4, **ROBUST},
    "fedcm, robust": {"cohort_size": 4, "alpha": 0.5, **ROBUST},
    "fedprox, robust": {"cohort_size": 4, "mu": 0.3, **ROBUST},
    "fednova, robust": {"cohort_size": 4, **ROBUST},
    "stem, robust": {"a": 0.3, **ROBUST},
    "mb_storm, robust": {"cohort_size": 4, "beta": 0.5, **ROBUST},
    "centralised, robust": ROBUST,
    "fedasync, server optimizer": {"alpha": 0.5, "a": 0.1, "server_optimizer": ROBUST["server_optimizer"]},
    "fedfix, observed and robust": {"interval": 0.35, "weights": "observed", **ROBUST},
    "fedbuff, observed and robust": {"buffer_size": 3, "weights": "observed", **ROBUST},
    "fedfix, robust": {"interval": 0.35, **ROBUST},
    "fedbuff, robust": {"buffer_size": 3, "weights": "unbiased", **ROBUST},
    "fedbuff_stream, robust": {"buffer_size": 3, "concurrency": 4, **ROBUST},
    "extragradient, robust": {"lr": 0.1, "aggregator": "median"},
    "fedavg, fixed": {
        "cohort_size": 4,
        "selection": {"name": "fixed", "probabilities": [0.1, 0.1, 0.1, 0.2, 0.2, 0.3]},
    },
    "scaffold_m, power of choice": {
        "cohort_size": 3,
        "beta": 0.5,
        "selection": {"name": "power_of_choice", "candidates": 6},
    },
    "scaffold, oort": {"cohort_size": 3, "selection": "oort"},
    "fedavg_m, cyclic": {"cohort_size": 4, "beta": 0.5, "selection": {"name": "cyclic", "shuffle": True}},
    "fedbuff_stream, oort": {"buffer_size": 2, "concurrency": 4, "selection": "oort"},
}
"""Hyper-parameters for six clients; a strategy's name may be followed by what is special."""


def _kind(name: str) -> str:
    """Which strategy a row is of."""
    return name.partition(",")[0]


OWN_LINKS = {"ef21": "top_k", "ef21_bc": "top_k", "diana": "rand_k", "marina": "rand_k"}  # these compress by themselves
OWN_LINKS |= {"masha1": "rand_k", "masha2": "top_k"}
PEERS = {"dsgd", "monna", "gradient_tracking", "clipped_gossip", "bridge"}
PERSONAL = {"fedbn", "fedper", "fedrep", "ditto", "pfedme", "apfl"}  # whose clients have models of their own
CODING = {"uncoded", "gradient_coding", "sr_sgc", "m_sgc"}
NO_LINKS = {*PEERS, *CODING, "feddyn", "fedasync"}  # whose messages nobody may compress
NO_STEPS = {"extragradient", "optimistic_gradient", "masha1", "masha2", *CODING}  # of clients' own
ONE_STEP = {"centralised", "ef21", "ef21_bc", "diana", "marina"}  # a round
SLOW = {*ONE_STEP, "fedasync"}  # or one model in six mixed in
COHORTS = sorted(
    k for k in ROWS if "cohort_size" in ROWS[k] and "selection" not in ROWS[k] and _kind(k) not in ONE_STEP
)
ASYNCHRONOUS = {"async_fedavg", "fedasync", "fedfix", "fedbuff", "fedbuff_stream"}

ABSENT = {"availability": {"name": "markov", "on_seconds": 3.0, "off_seconds": 0.5}, "dropout": {"probability": 0.15}}

every_strategy = pytest.mark.parametrize("name", ROWS)


def test_every_strategy_has_a_row_and_every_row_a_strategy() -> None:
    named = {_kind(name) for name in ROWS}
    missing, unknown = sorted(set(STRATEGIES) - named), sorted(named - set(STRATEGIES))
    assert not missing, f"{missing}: add a row of parameters to ROWS in {__file__}"
    assert not unknown, f"{unknown}: no such strategy; take the row out of ROWS in {__file__}"


def _make(name: str, task: Any, **changes: Any) -> Any:
    """The strategy by hand, with five local steps of noisy gradients."""
    kind = STRATEGIES[_kind(name)]
    known = {"local": local_sgd(task, 0.05, steps=5), "count": len(task.num_examples)}
    known |= {"layout": task.layout, "personal": ()}  # a formula has one entry only, which is shared
    given = {key: value for key, value in known.items() if key in signature(kind).parameters}
    if "aggregator" in ROWS[name]:
        given["aggregator"] = AGGREGATORS[ROWS[name]["aggregator"]]()
    if "topology" in ROWS[name]:
        _, graph, settings = named(TOPOLOGIES, ROWS[name]["topology"], "topology")
        given["topology"] = TOPOLOGIES[graph](**settings)
    if "selection" in ROWS[name]:
        _, chooser, settings = named(SELECTIONS, ROWS[name]["selection"], "selection")
        given["selection"] = SELECTIONS[chooser](**settings)
    if "server_optimizer" in ROWS[name]:
        given["server_optimizer"] = build(ROWS[name]["server_optimizer"], task.layout)
    return kind(**{**ROWS[name], **given, **changes})


def _config(name: str, **changes: Any) -> dict[str, Any]:
    """A small real problem: uneven clients, two stacks at least, some of the links compressed."""
    strategy: dict[str, Any] = {"name": _kind(name), **ROWS[name]}
    config: dict[str, Any] = {
        "rounds": 6,
        "task": {"name": "classification", "dataset": "digits", "model": "logistic"},
        "partition": {"name": "dirichlet", "alpha": 0.3},
        "clients": {"count": 6, "devices": {"name": "f_x", "x": 80}},
        "strategy": strategy,
        "local": {"steps": 2, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.05}},
        "evaluate": {"every": 3},
        "runtime": {"workers": 1, "stack": 2},
    }
    if name.endswith("absent"):
        config["clients"] |= ABSENT
    if _kind(name) in OWN_LINKS:
        strategy["compressor"] = {"name": OWN_LINKS[_kind(name)], "fraction": 0.2}
        if "server_compressor" in signature(STRATEGIES[_kind(name)]).parameters:
            strategy["server_compressor"] = {"name": OWN_LINKS[_kind(name)], "fraction": 0.5}
    elif _kind(name) not in NO_LINKS:
        config["uplink"] = {"compressor": {"name": "top_k", "fraction": 0.2}, "error_feedback": True}
        config["downlink"] = {"compressor": "natural"}
    if _kind(name) in NO_STEPS:
        del config["local"]
    if _kind(name) in PERSONAL:
        config["data"] = {"client_test": 0.2}
    if _kind(name) in PEERS:
        config["clients"]["byzantine"] = {"attack": {"name": "mimic", "warmup": 2}, "count": 1}
    return config | changes


@cache
def _run(name: str) -> Rows:
    """The rows of the small real problem, which several tests look at."""
    return rows_of(_config(name))


# Same bits -------------------------------------------------------------------------------------------------------


@every_strategy
def test_the_number_of_workers_does_not_show(name: str) -> None:
    assert rows_of(_config(name, runtime={"workers": 2, "stack": 2})) == _run(name) and len(_run(name)) == 6


@every_strategy
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(name: str, tmp_path: Path) -> None:
    rows_of(_config(name, rounds=3), tmp_path)
    assert rows_of(_config(name), tmp_path, resume=True) == _run(name)[3:]


@every_strategy
def test_the_seed_decides_everything(name: str) -> None:
    task = drawn(6, 3, noise=0.2)

    def path(seed: int) -> torch.Tensor:
        return Play.start(task, _make(name, task), seed=seed, devices=Clocks(f_80(6))).path(4)

    assert torch.equal(path(0), path(0)) and not torch.equal(path(0), path(1))


@every_strategy
def test_the_width_of_a_stack_changes_rounding_only(name: str) -> None:
    task = drawn(6, 3, noise=0.2)
    whole = Play.start(task, _make(name, task), devices=Clocks(f_80(6)), width=64).path(6)
    for width, workers in ((1, 1), (4, 2)):
        cut = Play.start(task, _make(name, task), devices=Clocks(f_80(6)), width=width, workers=workers).path(6)
        torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)


@every_strategy
def test_a_strategy_travels_by_pickle(name: str) -> None:
    task = drawn(6, 3, noise=0.2)
    strategy = _make(name, task)
    again = pickle.loads(pickle.dumps(strategy))
    paths = [Play.start(task, s, devices=Clocks(f_80(6))).path(4) for s in (strategy, again)]
    assert torch.equal(paths[0], paths[1])


# Same samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COHORTS)
@pytest.mark.parametrize("size", [None, 4])
def test_changing_the_algorithm_keeps_cohorts_and_minibatches(name: str, size: int | None) -> None:
    keys = []
    for kind in ("fedavg", name):
        task = drawn(6, 3)
        seen = watched(task)
        Play.start(task, _make(kind, task, cohort_size=size)).path(5)
        keys.append(sorted(set(seen)))
    assert keys[0] == keys[1] and len(keys[0]) == 5 * (size or 6) * 5


@pytest.mark.parametrize("name", ["dsgd", "monna", "centralised", "ef21", "diana"])
def test_one_step_sees_the_minibatches_that_one_of_fedavg_would(name: str) -> None:
    keys = []
    for kind in ("fedavg", name):
        task = drawn(6, 3)
        seen = watched(task)
        changes: dict[str, Any] = {"cohort_size": ROWS[name].get("cohort_size")} if kind == "fedavg" else {}
        Play.start(task, _make(kind, task, local=local_sgd(task, 0.05, steps=1), **changes)).path(5)
        keys.append(seen)
    assert keys[0] == keys[1]


# What it is for --------------------------------------------------------------------------------------------------


@every_strategy
def test_clients_that_agree_on_the_solution_are_taken_there(name: str) -> None:
    task = quadratic([0.5, 0.8, 1.0, 1.2, 1.5, 2.0], [3.0] * 6, 0.0)
    lr = 0.1 if _kind(name) in SLOW | PEERS else 0.02
    rate = {} if _kind(name) in NO_STEPS else {"local": local_sgd(task, lr, steps=5)}
    play = Play.start(task, _make(name, task, **rate), devices=Clocks((0.7,) * 6))
    while (play.path(20)[-5:] - 3.0).abs().max() > 1e-3:
        assert play.round < 180


@every_strategy
def test_a_model_learns_digits(name: str) -> None:
    links: dict[str, Any] = {"uplink": {}, "downlink": {}} if _kind(name) in ASYNCHRONOUS else {}
    stop = {"test_loss": math.log(10) - 0.03}  # well below what a model that knows nothing has
    rows = rows_of(_config(name, rounds=96, stop=stop, evaluate={"every": 4}, **links))
    assert rows[-1]["test_loss"] <= stop["test_loss"]


# Manners ---------------------------------------------------------------------------------------------------------


@every_strategy
def test_a_round_leaves_the_state_it_was_given_as_it_was(name: str) -> None:
    task = drawn(6, 3, noise=0.2)
    play = Play.start(task, _make(name, task), devices=Clocks(f_80(6)))
    play.path(3)
    before = pickle.dumps(play.state)
    old = play.state
    play.step()
    assert pickle.dumps(old) == before


@every_strategy
def test_the_server_half_uses_nothing_but_the_fleets_seam(name: str) -> None:
    used = set()

    class Noting:
        """A fleet that notes which of its names a strategy asks for."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __getattr__(self, key: str) -> Any:
            used.add(key)
            return getattr(self._inner, key)

    task = drawn(6, 3)
    play = Play.start(task, _make(name, task), devices=Clocks(f_80(6)))
    play.fleet = Noting(play.fleet)  # type: ignore[assignment]
    play.path(3)
    promised = {*Fleet.__annotations__, *(k for k in vars(Fleet) if not k.startswith("_")), "end_round"}  # by Play
    assert used and used <= promised


@every_strategy
def test_the_clock_never_goes_back_and_bits_only_grow(name: str) -> None:
    rows = _run(name)
    for key in ("virtual_seconds", "bits_up", "bits_down"):
        values = [row[key] for row in rows]
        assert values == sorted(values) and values[-1] > 0, key


@every_strategy
def test_an_attack_changes_the_run(name: str) -> None:
    task = drawn(6, 3)
    paths = []
    for lies in (None, Byzantine(ids=torch.tensor([5]), attack=InnerProduct(tau=2.0), seed=0)):
        changes: dict[str, Any] = {"f": 0, "arrival": "all"} if name == "monna" else {}
        if "cohort_size" in ROWS[name]:
            changes["cohort_size"] = None
        paths.append(Play.start(task, _make(name, task, **changes), devices=Clocks(f_80(6)), byzantine=lies).path(6))
    assert not torch.equal(paths[0], paths[1]) and bool(paths[1].isfinite().all())
