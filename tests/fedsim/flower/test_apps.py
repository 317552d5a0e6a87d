"""Whole runs over a grid in this process, against the simulator.

The simulator's stacks are of one client here, as a deployment's are; then both compute the same products of the same
numbers, and quadratics and saddle points come out equal to the last bit.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedsim import apps, runs
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.flower.clock import Patience
from fedsim.flower.door import Door, Refused
from fedsim.flower.wire import ABOUT, TENSORS, Book
from fedsim.history import History
from fedsim.overrides import apply_overrides
from fedsim.sim.executor import ClientError
from fedsim.stop import Diverged
from fedsim.strategies import STRATEGIES
from tests.build import train
from tests.fedsim.flower.local_grid import LocalGrid, VirtualClock, as_bytes, through_bytes

N = 5
LOCAL = {"steps": 4, "batch_size": "full", "optimizer": {"name": "sgd", "lr": 0.1}}
QUADRATIC: dict[str, Any] = {"task": {"name": "quadratic", "dim": 6, "noise": 0.1}, "local": LOCAL}
SADDLE: dict[str, Any] = {"task": {"name": "bilinear", "dim": 6}}
RAND_K, TOP_K, QSGD = {"name": "rand_k", "k": 4}, {"name": "top_k", "k": 2}, {"name": "qsgd", "levels": 4}
SECOND = {"name": "constant", "seconds_per_step": 0.25}  # four local steps take one second

DESCENT = {key: value for key, value in QUADRATIC.items() if key != "local"}

CASES: dict[str, dict[str, Any]] = {
    "fedavg": {**QUADRATIC, "strategy": {"name": "fedavg", "cohort_size": 3}},
    "fedavg, server optimizer": {
        **QUADRATIC,
        "strategy": {"name": "fedavg", "server_optimizer": {"name": "adam", "lr": 0.1}},
    },
    "fedavg, robust": {**QUADRATIC, "strategy": {"name": "fedavg", "aggregator": "median"}},
    "fedavg, compressed both ways": {
        **QUADRATIC,
        "strategy": {"name": "fedavg", "cohort_size": 2},
        "uplink": {"compressor": TOP_K, "error_feedback": True},
        "downlink": {"compressor": RAND_K},
    },
    "fedavg, seeded indices": {
        **QUADRATIC,
        "strategy": {"name": "fedavg"},
        "uplink": {"compressor": {**RAND_K, "shared_seed": True}},
        "downlink": {"compressor": {**RAND_K, "shared_seed": True}},
    },
    "fedavg, mezo by seeds": {
        **QUADRATIC,
        "local": {**LOCAL, "optimizer": {"name": "mezo", "lr": 0.02}},
        "strategy": {"name": "fedavg", "cohort_size": 3},
        "uplink": {"compressor": {"name": "seeds", "steps": 4}},
    },
    "ef21, a compressor that knows the model": {
        **DESCENT,
        "strategy": {"name": "ef21", "compressor": {"name": "per_tensor", "of": QSGD}},
        "local": {**LOCAL, "steps": 1},
    },
    "ef21_bc": {
        **DESCENT,
        "strategy": {"name": "ef21_bc", "compressor": TOP_K, "server_compressor": TOP_K},
        "local": {**LOCAL, "steps": 1},
    },
    "diana": {
        **DESCENT,
        "strategy": {"name": "diana", "compressor": RAND_K, "cohort_size": 3},
        "local": {**LOCAL, "steps": 1},
    },
    "marina": {
        **DESCENT,
        "strategy": {"name": "marina", "p": 0.5, "compressor": RAND_K},
        "local": {**LOCAL, "steps": 1},
    },
    "fedavg, by samples": {**QUADRATIC, "strategy": {"name": "fedavg", "cohort_size": 3, "selection": "by_samples"}},
    "fedavg, oort": {**QUADRATIC, "strategy": {"name": "fedavg", "cohort_size": 2, "selection": "oort"}},
    "scaffold, power of choice": {
        **QUADRATIC,
        "strategy": {
            "name": "scaffold",
            "cohort_size": 2,
            "selection": {"name": "power_of_choice", "candidates": 4},
        },
    },
    "fedavg_m": {**QUADRATIC, "strategy": {"name": "fedavg_m", "beta": 0.5}},
    "fedavg_m_vr": {**QUADRATIC, "strategy": {"name": "fedavg_m_vr", "beta": 0.5}},
    "scaffold": {**QUADRATIC, "strategy": {"name": "scaffold", "cohort_size": 3}},
    "scaffold_m": {**QUADRATIC, "strategy": {"name": "scaffold_m", "cohort_size": 3, "beta": 0.5}},
    "scaffold_m, compressed": {
        **QUADRATIC,
        "strategy": {"name": "scaffold_m", "cohort_size": 3},
        "uplink": {"compressor": RAND_K},
    },
    "local adam that remembers": {
        **QUADRATIC,
        "strategy": {"name": "fedavg", "cohort_size": 3},
        "local": {**LOCAL, "optimizer": {"name": "adam", "lr": 0.01, "state_scope": "client"}},
    },
    "scaffold_m_vr": {**QUADRATIC, "strategy": {"name": "scaffold_m_vr", "beta": 0.5}},
    "mime, compressed both ways": {
        **QUADRATIC,
        "strategy": {"name": "mime", "cohort_size": 3},
        "local": {**LOCAL, "optimizer": {"name": "adam", "lr": 0.01}},
        "uplink": {"compressor": RAND_K},
        "downlink": {"compressor": RAND_K},
    },
    "mime_lite": {**QUADRATIC, "strategy": {"name": "mime_lite", "cohort_size": 3}},
    "fedcm": {
        **QUADRATIC,
        "strategy": {"name": "fedcm", "cohort_size": 3},
        "local": {**LOCAL, "optimizer": {"name": "sgd", "lr": 0.05, "schedule": {"name": "exponential", "gamma": 0.8}}},
    },
    "fedprox": {**QUADRATIC, "strategy": {"name": "fedprox", "mu": 0.5}},
    "feddyn": {**QUADRATIC, "strategy": {"name": "feddyn", "cohort_size": 3}},
    "fednova, compressed": {
        **QUADRATIC,
        "strategy": {"name": "fednova", "cohort_size": 3, "mu": 0.5},
        "uplink": {"compressor": RAND_K},
    },
    "stem": {**QUADRATIC, "strategy": {"name": "stem", "a": 0.3}},
    "mb_storm": {**QUADRATIC, "strategy": {"name": "mb_storm", "cohort_size": 3, "beta": 0.5}},
    "centralised": {**QUADRATIC, "strategy": {"name": "centralised"}},
    "async_fedavg": {**QUADRATIC, "strategy": {"name": "async_fedavg", "weights": "identical"}},
    "async_fedavg, observed": {**QUADRATIC, "strategy": {"name": "async_fedavg", "weights": "observed"}},
    "fedasync": {**QUADRATIC, "strategy": {"name": "fedasync"}},
    "fedbuff": {**QUADRATIC, "strategy": {"name": "fedbuff", "buffer_size": 2, "weights": "identical"}},
    "fedbuff_stream": {**QUADRATIC, "strategy": {"name": "fedbuff_stream", "buffer_size": 2, "concurrency": 4}},
    "fedfix": {**QUADRATIC, "strategy": {"name": "fedfix", "interval": 1.5, "weights": "identical"}},
    "monna": {**QUADRATIC, "strategy": {"name": "monna", "beta": 0.9, "f": 1}},
    "monna, adversarial arrival": {
        **QUADRATIC,
        "strategy": {"name": "monna", "beta": 0.9, "f": 1, "arrival": "adversarial"},
    },
    "dsgd": {**QUADRATIC, "strategy": {"name": "dsgd", "topology": {"name": "random_regular", "degree": 2}}},
    "gradient_tracking": {**QUADRATIC, "strategy": {"name": "gradient_tracking", "topology": "ring"}},
    "clipped_gossip": {**QUADRATIC, "strategy": {"name": "clipped_gossip", "f": 1, "topology": "ring"}},
    "bridge": {**QUADRATIC, "strategy": {"name": "bridge", "topology": "ring"}},
    "masha1": {
        **SADDLE,
        "strategy": {"name": "masha1", "lr": 0.1, "p": 0.5, "compressor": RAND_K, "server_compressor": QSGD},
    },
    "masha2": {
        **SADDLE,
        "strategy": {"name": "masha2", "lr": 0.05, "p": 0.5, "compressor": TOP_K, "server_compressor": TOP_K},
    },
    "masha1, minibatches of some clients": {
        "task": QUADRATIC["task"],
        "strategy": {
            "name": "masha1",
            "lr": 0.05,
            "p": 0.5,
            "batch_size": 2,
            "cohort_size": 3,
            "compressor": {**RAND_K, "shared_seed": True},
            "server_compressor": QSGD,
        },
    },
    "optimistic_gradient": {**SADDLE, "strategy": {"name": "optimistic_gradient", "lr": 0.1}},
    "extragradient": {**SADDLE, "strategy": {"name": "extragradient", "lr": 0.1}},
    "uncoded": {**DESCENT, "strategy": {"name": "uncoded", "lr": 0.1}},
    "gradient_coding": {**DESCENT, "strategy": {"name": "gradient_coding", "lr": 0.1, "s": 2}},
    "sr_sgc": {**DESCENT, "strategy": {"name": "sr_sgc", "lr": 0.1, "B": 1, "W": 2, "lam": 3}},
    "m_sgc": {**DESCENT, "strategy": {"name": "m_sgc", "lr": 0.1, "B": 1, "W": 2, "lam": 2}},
}
RELAYED = ("monna", "dsgd", "gradient_tracking", "clipped_gossip", "bridge")
AGAIN = {"mime, compressed both ways": (3, 4), "stem": (N, 1)}  # clients and rounds in which what is held travels again


def experiment(name: str, rounds: int = 4) -> dict[str, Any]:
    common = {"seed": 3, "rounds": rounds, "evaluate": {"every": 1}, "runtime": {"stack": 1}}
    return {**common, "clients": {"count": N, "devices": SECOND}, **CASES[name]}


def rows_of(raw: Mapping[str, Any], seconds: Any = lambda i: 1.0, memory: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a run over a local grid that leaves no run folder; clients' memory lies in one if it is given."""
    grid = LocalGrid(apps.client_app(raw), len_clients(raw), clock=VirtualClock(), seconds=seconds)
    if memory is not None:
        remember_in(memory, grid)
    return rows_on(grid, raw)


def rows_on(grid: LocalGrid, raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run over a grid."""
    composition = compose(apply_overrides(raw, apps.DEPLOYED, "config"), "config")
    try:
        composition.experiment.fleet = apps.deploy(composition, grid, Patience(poll_seconds=0.1), grid.clock)
        return train(composition.experiment)[1]
    finally:
        composition.close()


def deploy(raw: Mapping[str, Any], folder: Path, seconds: Any = lambda i: 1.0, **settings: Any) -> History:
    """A run over a local grid whose clients answer after some virtual seconds."""
    clock = VirtualClock()
    grid = LocalGrid(apps.client_app(raw), len_clients(raw), settings, clock=clock, seconds=seconds)
    return apps.serve(grid, raw, {"fedsim-out": str(folder), **settings}, clock)


def remember_in(folder: Path, grid: LocalGrid) -> None:
    for context in grid.contexts.values():
        context.node_config["fedsim-memory"] = str(folder)


def len_clients(raw: Mapping[str, Any]) -> int:
    count: int = raw["clients"]["count"]
    return count


def test_every_strategy_of_the_table_is_tried_over_the_wire() -> None:
    assert {raw["strategy"]["name"] for raw in CASES.values()} | set(PERSONAL) == set(STRATEGIES)


@pytest.mark.parametrize("name", CASES)
def test_a_run_over_the_wire_gives_the_simulators_numbers(name: str, tmp_path: Path) -> None:
    raw = experiment(name)
    expected, got = runs.run(raw).rows, rows_of(raw, memory=tmp_path / "memory")
    clocks = {"virtual_seconds", "wall_seconds", "bits_up", "bits_down"}
    for row, other in zip(got, expected, strict=True):
        assert {k: v for k, v in row.items() if k not in clocks} == {k: v for k, v in other.items() if k not in clocks}
        assert "x" in row
        if not name.startswith(RELAYED):
            clients, rounds = AGAIN.get(name, (0, 0))
            down = other["bits_down"] + clients * min(rounds, row["round"]) * 6 * 32
            assert (row["bits_up"], row["bits_down"]) == (other["bits_up"], down)


ENVELOPE = 1400  # bytes: names, types and shapes of a reply's parts, its head, and the parts' numbers at Flower


@pytest.mark.parametrize("dim", [6, 300])
@pytest.mark.parametrize("name", ["fedavg, compressed both ways", "masha1", "masha2"])
def test_replies_are_as_long_as_the_ledger_says_and_an_envelope(name: str, dim: int) -> None:
    raw = json.loads(json.dumps(experiment(name)).replace('"dim": 6', f'"dim": {dim}'))
    raw["strategy"] |= {"lr": 1e-3} if "lr" in raw["strategy"] else {}
    replies: list[RecordDict] = []

    class Watched(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            came = list(super().pull_messages(message_ids))
            replies.extend(m.content for m in came if m.metadata.message_type == "train")
            return came

    rows = rows_on(Watched(apps.client_app(raw), N), raw)
    vectors = [[len(array.data) for array in reply[TENSORS].values()] for reply in replies]
    assert (
        0 <= 8 * sum(map(sum, vectors)) - rows[-1]["bits_up"] < 8 * sum(map(len, vectors))
    )  # packets fill whole bytes
    envelopes = [sum(map(len, as_bytes(r).values())) - sum(v) for r, v in zip(replies, vectors, strict=True)]
    assert len(replies) >= 2 * len(rows) and 0 < min(envelopes) <= max(envelopes) < ENVELOPE


POWER = {"compressor": {"name": "powersgd", "rank": 1}, "error_feedback": True}


@pytest.mark.parametrize("uplink", [{}, POWER], ids=["whole", "after the last packet"])
def test_minibatches_of_a_classifier_agree_to_float32(uplink: dict[str, Any], tmp_path: Path) -> None:
    raw = {
        "rounds": 3,
        "task": {"name": "classification", "dataset": "digits", "model": {"name": "logistic"}},
        "clients": {"count": 4},
        "strategy": {"name": "fedavg", "cohort_size": 3},
        "local": {"epochs": 1, "batch_size": 20, "optimizer": {"name": "sgd", "lr": 0.1}},
        "uplink": uplink,
        "evaluate": {"every": 1},
        "runtime": {"stack": 1},
    }
    expected, got = runs.run(raw).rows, deploy(raw, tmp_path / "run").rows
    for row, other in zip(got, expected, strict=True):
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
        assert row["num_clients"] == other["num_clients"] == 3
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
    assert (tmp_path / "run" / "clients.jsonl").exists()


def test_adapters_travel_and_their_base_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {
        "rounds": 2,
        "task": {
            "name": "classification",
            "dataset": "digits",
            "model": {"name": "mlp", "hidden": [300]},
            "lora": {"targets": ["1"], "rank": 2, "dropout": 0.2},
            "train": ["3.bias"],
        },
        "clients": {"count": 3},
        "strategy": {"name": "fedavg", "cohort_size": 2},
        "local": {"steps": 2, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 0.01}},
        "evaluate": {"every": 1, "per_client": False},
        "runtime": {"stack": 1},
    }
    sent = []

    def noted(record: RecordDict) -> RecordDict:
        sent.append(sum(map(len, as_bytes(record).values())))
        return through_bytes(record)

    monkeypatch.setattr("tests.fedsim.flower.local_grid.through_bytes", noted)
    expected, got = runs.run(raw).rows, rows_of(raw)
    trained = 2 * 64 + 300 * 2 + 10
    for row, other in zip(got, expected, strict=True):
        assert row["test_loss"] == other["test_loss"] and row["train_loss"] == other["train_loss"]
        assert row["bits_up"] == row["bits_down"] == other["bits_up"] == row["round"] * 2 * 32 * trained
    assert 4 * trained < max(sent) < 4 * trained + 4096 < 4 * 64 * 300


NORMED = {"name": "resnet_bn", "width": 2, "stages": 1}  # fedbn keeps normalisation layers to each client
PERSONAL: dict[str, dict[str, Any]] = {
    "fedbn": {"name": "fedbn"},
    "fedper": {"name": "fedper", "personal": ["1.bias"], "cohort_size": 3},
    "fedrep": {"name": "fedrep", "personal": ["1.bias"], "head_epochs": 2},
    "ditto": {"name": "ditto", "cohort_size": 3},
    "pfedme": {"name": "pfedme", "lam": 5.0, "inner_lr": 0.05},
    "apfl": {"name": "apfl", "adaptive": True},
}


@pytest.mark.parametrize("name", PERSONAL)
def test_clients_own_models_stay_on_their_devices_and_are_evaluated_there(name: str, tmp_path: Path) -> None:
    raw = {
        "rounds": 3,
        "task": {"name": "classification", "dataset": "digits", "model": NORMED if name == "fedbn" else "logistic"},
        "clients": {"count": 4},
        "data": {"client_test": 0.2},
        "strategy": PERSONAL[name],
        "local": {"epochs": 1, "batch_size": 20, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluate": {"every": 1, "personalise": {"epochs": 1}},
        "runtime": {"stack": 1},
    }
    expected, got = runs.run(raw).rows, deploy(raw, tmp_path / "run").rows
    for row, other in zip(got, expected, strict=True):
        assert (row["bits_up"], row["bits_down"]) == (other["bits_up"], other["bits_down"])
        for key in ("train_loss", "test_loss", "personal_loss", "personal_accuracy", "global_loss"):
            assert row[key] == pytest.approx(other[key], rel=1e-5), key
    assert got[-1]["personal_loss"] < got[0]["personal_loss"]


def test_windows_close_on_whoever_arrived_as_in_the_simulator(tmp_path: Path) -> None:
    raw = experiment("fedfix", rounds=8)
    raw["clients"] = {"count": N, "devices": {"name": "f_x", "x": 80, "slowest": 3.0}}
    simulated = runs.run(raw).rows
    got = deploy(raw, tmp_path / "run", seconds=lambda i: 3.0 * (1 - 0.8 * i / (N - 1))).rows
    assert [r["num_clients"] for r in got] == [r["num_clients"] for r in simulated]
    assert [r.get("staleness_mean") for r in got] == [r.get("staleness_mean") for r in simulated]
    assert any(r.get("staleness_mean", 0) > 0 for r in got)
    for row, other in zip(got, simulated, strict=True):
        assert row["x"] == pytest.approx(other["x"], rel=1e-6)  # a look finds several replies, whose order it can't see
    assert len((tmp_path / "run" / "timeline.jsonl").read_text().splitlines()) == sum(r["num_clients"] for r in got)


@pytest.mark.parametrize("name", ["gradient_coding", "sr_sgc"])
def test_a_device_that_is_always_late_is_done_without(name: str) -> None:
    plain = experiment("uncoded", rounds=8)
    plain["strategy"] = {**plain["strategy"], "num_models": 1 if name == "gradient_coding" else 2}
    expected = [row["x"] for row in rows_of(plain)]
    rows = rows_of(experiment(name, rounds=8), seconds=lambda i: 9.0 if i == 1 else 1.0)
    assert [row["stragglers"] for row in rows] == [1] * 8 and rows[-1]["virtual_seconds"] < 8 * 2.5
    assert [row["jobs_done"] for row in rows] == [*range(1, 9)]
    for row, x in zip(rows, expected, strict=True):
        assert row["x"] == pytest.approx(x, rel=1e-4, abs=1e-6)


def test_an_exchange_is_paid_for_twice_once_up_and_once_down(tmp_path: Path) -> None:
    row = deploy(experiment("monna, adversarial arrival", rounds=1), tmp_path / "run").rows[0]
    vector = 6 * 32
    assert row["bits_up"] == 2 * N * vector  # the half step, and the mixed model for evaluation
    heard = N * (N - 1)  # one of five never arrives
    assert row["bits_down"] == heard * vector + N * vector  # and x0; both ends know the rate and how many to keep


def test_a_run_leaves_the_files_of_any_run(tmp_path: Path) -> None:
    deploy(experiment("fedavg"), tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "model.safetensors", "report.html", "checkpoints"} <= names
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    simulated = runs.run(tmp_path / "run" / "config.yaml").rows
    assert [row["x"] for row in rows] == [row["x"] for row in simulated]


@pytest.mark.parametrize("name", ["fedavg", "fedavg, seeded indices", "fedfix"])
def test_a_resumed_run_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    raw = experiment(name, rounds=6)
    slow = (lambda i: 1.0) if name != "fedfix" else (lambda i: 1.0 + 0.7 * i)
    deploy({**raw, "rounds": 3}, tmp_path / "run", slow)
    got = deploy(raw, tmp_path / "run", slow, **{"fedsim-resume": True}).rows
    assert [row["round"] for row in got] == [1, 2, 3, 4, 5, 6]
    if name == "fedavg":
        assert got[-1]["x"] == runs.run(raw).rows[-1]["x"]
    if name == "fedfix":  # jobs in flight were sent again, so that nobody falls silent
        assert sum(row["num_clients"] for row in got[3:]) >= N


def test_resuming_without_the_clients_memory_fails_loudly(tmp_path: Path) -> None:
    raw = experiment("scaffold_m", rounds=6)
    raw["strategy"] = {**raw["strategy"], "cohort_size": N}
    deploy({**raw, "rounds": 3}, tmp_path / "run")
    with (
        pytest.raises(ClientError, match=r"every client failed: .*its memory is gone.*client 4 \(node"),
        pytest.warns(UserWarning, match="its memory is gone"),
    ):
        deploy(raw, tmp_path / "run", **{"fedsim-resume": True})


class Killed(BaseException):
    """What ends a server without a word."""


class DeadlyGrid(LocalGrid):
    """A grid that kills the server in the middle of a round, when it sends its n-th message."""

    deadly: float = inf

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        if self._count >= self.deadly:
            raise Killed
        return ids


@pytest.mark.parametrize("name", ["scaffold_m", "scaffold_m, compressed", "local adam that remembers"])
@pytest.mark.parametrize("every", [1, 4])
def test_devices_that_keep_their_memory_in_a_folder_resume(name: str, every: int, tmp_path: Path) -> None:
    raw = {**experiment(name, rounds=8), "checkpoint": {"every": every}}
    settings = {"fedsim-out": str(tmp_path / "run")}
    for deadly, resume in ((N + 3 * 7, False), (inf, True)):  # three clients a round, and the queries before
        clock = VirtualClock()
        grid = DeadlyGrid(apps.client_app(raw), N, clock=clock)  # new SuperNodes, whose contexts are empty
        grid.deadly = deadly
        remember_in(tmp_path / "memory", grid)
        if resume:  # and another run has been there meanwhile
            rows_of({**raw, "strategy": {**raw["strategy"], "server_lr": 0.5}}, memory=tmp_path / "memory")
        with nullcontext() if resume else pytest.raises(Killed):
            got = apps.serve(grid, raw, {**settings, "fedsim-resume": resume}, clock).rows
    assert [row["x"] for row in got] == [row["x"] for row in runs.run(raw).rows]
    assert 0 < len(list((tmp_path / "memory").glob("client-*-of-*.safetensors"))) <= 2 * N


def test_a_new_run_does_not_begin_with_the_memory_of_an_old_one(tmp_path: Path) -> None:
    raw = experiment("scaffold_m", rounds=3)
    for run in ("one", "two"):
        clock = VirtualClock()
        grid = LocalGrid(apps.client_app(raw), N, clock=clock)
        remember_in(tmp_path / "memory", grid)
        got = apps.serve(grid, raw, {"fedsim-out": str(tmp_path / run)}, clock).rows
        assert [row["x"] for row in got] == [row["x"] for row in runs.run(raw).rows]


def test_a_run_that_diverges_ends_with_the_message_of_a_simulation() -> None:
    raw = experiment("fedavg", rounds=40)
    raw["local"] = {**LOCAL, "optimizer": {"name": "sgd", "lr": 1e3}}
    with pytest.raises(Diverged) as simulated:
        runs.run(raw)
    with (
        pytest.raises(Diverged, match="what every client sent not finite") as deployed,
        pytest.warns(UserWarning, match="its reply is refused"),
    ):
        rows_of(raw)
    ending = "the run diverged; lower local.optimizer.lr or strategy.server_lr, clip gradients (local.optimizer.clip)"
    assert ending in str(deployed.value) and ending in str(simulated.value)


def test_attacks_are_refused(tmp_path: Path) -> None:
    raw = experiment("fedavg")
    raw["clients"] = {"count": N, "byzantine": {"attack": "sign_flip", "count": 1}}
    with pytest.raises(ConfigError, match="attacks are simulated"):
        deploy(raw, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is written before the fleet stands"


def test_an_experiment_may_come_as_text_and_be_overridden_by_run_and_node(tmp_path: Path) -> None:
    raw = experiment("fedavg")
    settings = {"fedsim-config": json.dumps(raw), "fedsim-overrides": "rounds=2 local.optimizer.lr=0.2"}
    found, _ = apps.experiment_of(None, settings, {"fedsim-overrides": "runtime.device=cpu"})
    assert (found["rounds"], found["local"]["optimizer"]["lr"], found["runtime"]["device"]) == (2, 0.2, "cpu")
    clock = VirtualClock()
    grid = LocalGrid(apps.client, N, settings, clock=clock)
    rows = apps.serve(grid, None, {**settings, "fedsim-out": str(tmp_path / "run")}, clock).rows
    local = {**LOCAL, "optimizer": {"name": "sgd", "lr": 0.2}}
    assert rows[-1]["x"] == runs.run({**raw, "rounds": 2, "local": local}).rows[-1]["x"]


def test_a_server_compressor_that_leaves_its_indices_out_is_refused() -> None:
    raw = experiment("masha1")
    raw["strategy"] = {**raw["strategy"], "lr": 0.05, "server_compressor": {**RAND_K, "shared_seed": True}}
    with pytest.raises(ValueError, match="set shared_seed: false"):
        rows_of(raw)


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ("local.optimizer.lr=0.3", "local"),
        ("strategy.name=fedavg_m", "strategy"),
        ("seed=4", "seed"),
        ("task.dim=7", "model"),
        ("uplink={compressor: {name: top_k, k: 1}}", "uplink"),
    ],
)
def test_a_device_with_another_experiment_is_refused_by_name_before_the_first_round(there: str, what: str) -> None:
    raw = experiment("fedavg")
    grid = LocalGrid(apps.client_app(raw), N)
    composition = compose(apply_overrides(raw, apps.DEPLOYED, "config"), "config")
    node, context = list(grid.contexts.items())[2]
    context.node_config["fedsim-overrides"] = shlex.quote(there)
    with pytest.raises(ClientError, match=rf"node {node}: client 2 has another {what} than the server \('"):
        apps.deploy(composition, grid, Patience(), grid.clock)
    composition.close()


def test_a_device_with_another_fedsim_is_refused_by_name() -> None:
    door = Door(book=Book({}), seed=3, model_size=6, agreed={"fedsim": "1.0"})
    said = {"client": 2, "num_examples": 7}
    assert door.about(RecordDict({ABOUT: ConfigRecord({**said, "fedsim": "1.0"})}), N) == (2, 7)
    with pytest.raises(Refused, match=r"client 2 has another fedsim than the server \('0.9', and not '1.0'\)"):
        door.about(RecordDict({ABOUT: ConfigRecord({**said, "fedsim": "0.9"})}), N)
    with pytest.raises(Refused, match="its fedsim is another"):
        door.about(RecordDict({ABOUT: ConfigRecord(said)}), N)


def test_a_device_may_compute_its_steps_in_a_way_of_its_own() -> None:
    raw = experiment("local adam that remembers")
    raw["local"] = {**raw["local"], "optimizer": {**raw["local"]["optimizer"], "backend": "eager"}}
    composition = compose(apply_overrides(raw, apps.DEPLOYED, "config"), "config")
    grid = LocalGrid(apps.client_app(raw), N)
    for context in grid.contexts.values():
        context.node_config["fedsim-overrides"] = "local.optimizer.backend=fused evaluate.every=9"
    assert len(apps.deploy(composition, grid, Patience(), grid.clock).clients) == N
    composition.close()


def test_no_experiment_at_all_is_said_so() -> None:
    with pytest.raises(ConfigError, match="no experiment"):
        apps.experiment_of(None, {})


def test_what_is_exported_runs_and_holds_the_overrides(tmp_path: Path) -> None:
    folder = apps.export(experiment("fedavg"), tmp_path / "app", ("rounds=2", "strategy.server_lr=0.5"))
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    modules = [f"experiment/{name}" for name in ("__init__.py", "client_app.py", "experiment.yaml", "server_app.py")]
    assert files == ["LICENSE", *modules, "pyproject.toml"]
    raw, _ = apps.experiment_of(folder / "experiment" / "experiment.yaml", {})
    assert (raw["rounds"], raw["strategy"]["server_lr"]) == (2, 0.5)
    assert len(deploy(raw, tmp_path / "run").rows) == 2
    with pytest.raises(ConfigError, match="is not empty"):
        apps.export(experiment("fedavg"), folder)


def test_an_exported_app_answers_from_a_process_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {**experiment("scaffold_m"), "clients": {"count": 1}}
    raw["strategy"] = {**raw["strategy"], "cohort_size": 1}
    folder = apps.export(raw, tmp_path / "app")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("TMPDIR", "/tmp")  # the path of a socket may not be long
    monkeypatch.setattr("fedsim.warm.IDLE_SECONDS", 2)
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, start=subprocess.Popen, **k: started.append(start(*a, **k)))
    grid = LocalGrid(import_module("experiment.client_app").app, 1)
    settings = {"fedsim-out": str(tmp_path / "run")}
    rows = apps.serve(grid, folder / "experiment" / "experiment.yaml", settings, grid.clock).rows
    assert rows[-1]["x"] == runs.run(raw).rows[-1]["x"]
    (process,) = started
    (context,) = grid.contexts.values()
    context.node_config["partition-id"] = 7
    (reply,) = grid.send_and_receive([Message(RecordDict(), context.node_id, "query")])
    assert "ValueError: partition-id=7 is not one of the experiment's 1 clients" in reply.error.reason
    assert process.wait(60) == 0, "it ends when nobody asks it any more"
    assert callable(import_module("experiment.server_app").app)
