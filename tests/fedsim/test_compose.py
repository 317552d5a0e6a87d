"""The composition root: what an experiment file becomes, and what its plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

import fedsim
from fedsim.aggregate.prepare import Bucketing, Clipping
from fedsim.clients.local_training import LocalTraining
from fedsim.compose import TABLES, Composition, compose
from fedsim.compose.sections import Runtime
from fedsim.compose.work import Work, shares_of, speedup
from fedsim.config import ConfigError
from fedsim.data.images import DEBIAN
from fedsim.optim import schedules
from fedsim.overrides import read_file
from fedsim.sim.in_process import InProcess
from fedsim.sinks import JsonLines, TensorBoard
from fedsim.tasks.bilinear import BilinearTask
from fedsim.tasks.quadratic import QuadraticTask
from fedsim.tasks.supervised import SupervisedTask
from tests.composition import pair

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
BLOBS: dict[str, Any] = {
    "task": {
        "name": "classification",
        "dataset": {"name": "blobs", "num_examples": 400, "shape": [6], "num_classes": 4},
        "model": "logistic",
    },
    "clients": {"count": 20},
    "strategy": {"name": "fedavg", "cohort_size": 5},
}


def made(raw: dict[str, Any]) -> Composition:
    composition = compose(raw, "x.yaml")
    composition.close()
    return composition


@pytest.mark.filterwarnings("ignore:the step .* is above")  # some are tuned
@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_sound(config: Path) -> None:
    raw = read_file(config)
    if "fashion_mnist" in str(raw.get("task")) and not DEBIAN.exists():
        pytest.skip("needs Fashion-MNIST")
    if "shakespeare" in str(raw.get("task")):
        raw["data"] = {"root": str(CONFIGS[0].parents[1] / "data")}
    composition = made(raw)
    assert composition.experiment.rounds >= 1
    again = made(composition.resolved)
    assert again.resolved == composition.resolved, "the resolved file must say the same when read again"


def test_an_empty_file_is_the_defaults() -> None:
    composition = made({})
    e = composition.experiment
    assert e.rounds == 100 and e.seed == 0 and type(e.strategy).__name__ == "FedAvg"
    assert composition.samples is not None and composition.samples.data.num_clients == 100
    assert isinstance(composition.sinks[0], JsonLines) and len(composition.sinks) == 1
    assert composition.resolved["local"] == {
        "epochs": None,
        "steps": None,
        "batch_size": 20,
        "shuffle": True,
        "optimizer": {"name": "sgd", "lr": 0.05},
    }


def test_the_plan_says_what_will_run() -> None:
    plan = made({**BLOBS, "local": {"epochs": 2, "batch_size": 5}, "runtime": {"stack": 3, "workers": 2}}).plan
    assert plan["clients"] == "20, 5 of them in a round"
    assert plan["samples per client"] == "20 to 20, median 20; 0 clients have none"
    assert plan["local steps"] == "8 to 8"  # 20 samples in batches of 5 are 4 steps, twice
    assert plan["model"] == "28 parameters"  # 6 x 4 and 4
    assert plan["engine"].startswith("stacked, 3 clients a stack (stacks of 3 as set")
    # 3 and 2 of 5 clients with equal work
    assert plan["stacks"] == "2 a round; with 2, 4, 8 workers 1.7, 1.7, 1.7 times one worker's speed at best"
    assert plan["workers"].startswith("2 thread(s) in this process")
    assert plan["bits per round"].startswith("0.00 Mbit down")  # 5 x 28 x 32 bits


def test_the_plan_says_whether_values_were_scaled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.full((40, 3), 255, dtype=np.uint8), y=np.arange(40) % 2)
    files = {"name": "npz", "path": str(tmp_path / "x.npz")}
    as_they_are, scaled = (
        made({**BLOBS, "task": {**BLOBS["task"], "dataset": {**files, "images": images}}}) for images in (False, True)
    )
    assert as_they_are.samples is not None and float(as_they_are.samples.data.inputs.min()) == 255
    assert "taken as they are" in as_they_are.plan["data"]
    assert scaled.samples is not None and float(scaled.samples.data.inputs.max()) == 1
    assert scaled.plan["data"] == "Pixels were divided by 255."
    assert "divided by 16" in made({}).plan["data"] and "data" not in made(BLOBS).plan


def wide(features: int, hidden: int) -> dict[str, Any]:
    """A task whose clients see far fewer samples than the layers are wide."""
    dataset = {"name": "blobs", "num_examples": 80, "shape": [features], "num_classes": 4}
    return {"name": "classification", "dataset": dataset, "model": {"name": "mlp", "hidden": [hidden]}}


WIDE: dict[str, Any] = {
    "rounds": 2,
    "task": wide(200, 100),
    "clients": {"count": 8},
    "local": {"epochs": 1, "batch_size": 5, "optimizer": {"name": "sgd", "lr": 0.05}},
}
OWN = '''
from dataclasses import dataclass
from typing import ClassVar

from fedsim.clients.direction import gradient_at
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class Mine(FedAvg):
    """FedAvg by another name."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere(FedAvg):
    """Local steps along gradients at the model received."""

    traits: ClassVar[Traits] = Traits(two_points=True)

    def local_update(self, clients, x):
        return {"delta": self.local(clients, x, gradient_at(x)).delta}
'''


@pytest.mark.parametrize(
    ("strategy", "optimizer", "factors"),
    [
        ("fedavg", {}, True),
        ({"name": "scaffold", "option": "I"}, {}, True),
        ({"name": "scaffold", "option": "II"}, {}, True),
        ("fedavg_m", {}, True),
        ("scaffold_m", {}, True),
        ("fedcm", {}, True),
        ("fedprox", {}, True),
        ("feddyn", {}, True),
        ({"name": "fednova", "mu": 0.1}, {}, True),
        ({"name": "fedbuff", "buffer_size": 4}, {}, True),
        ("mime", {}, True),
        ("mime", {"momentum": 0.9}, False),
        ("scaffold_m_vr", {}, False),
        ("fedavg_m_vr", {}, False),
        ("dsgd", {}, False),
        ("own_strategies_for_compose:Mine", {}, True),
        ("own_strategies_for_compose:Elsewhere", {}, False),
        ("fedavg", {"momentum": 0.9}, False),
        ("fedavg", {"schedule": {"name": "cosine", "length": 5}}, False),
        ("fedavg", {"weight_decay": 0.0}, True),
    ],
)
def test_the_plan_announces_factors_where_clients_are_then_kept_in_factors(
    strategy: Any, optimizer: dict[str, Any], factors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_strategies_for_compose.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    taken = []
    real = SupervisedTask.factored_run

    def watched(*args: Any) -> Any:
        taken.append(real(*args))
        return taken[-1]

    monkeypatch.setattr(SupervisedTask, "factored_run", watched)
    local = {**WIDE["local"], "optimizer": {**WIDE["local"]["optimizer"], **optimizer}}
    raw = {**WIDE, "strategy": strategy, "local": local}
    assert ("low-rank" in made(raw).plan["engine"]) is factors
    fedsim.run(raw)
    assert any(t is not None for t in taken) is factors


def test_a_strategy_without_local_steps_is_planned_for_one_step_on_all_samples() -> None:
    plan = made({**BLOBS, "strategy": {"name": "extragradient", "lr": 0.1}}).plan
    assert plan["local steps"] == "1 to 1"


def test_a_section_that_task_or_strategy_would_not_read_is_refused_and_not_recorded() -> None:
    quadratic = {"task": {"name": "quadratic", "dim": 3}, "strategy": {"name": "extragradient", "lr": 0.1}}
    resolved = made(quadratic).resolved
    assert "partition" not in resolved and "local" not in resolved
    with pytest.raises(ConfigError, match="x.yaml: partition: quadratic has no data to divide, so nothing would"):
        made({**quadratic, "partition": "iid"})
    with pytest.raises(ConfigError, match="x.yaml: local: extragradient takes no local steps, so nothing would"):
        made({**quadratic, "local": {"steps": 3}})


def test_automatic_choices_are_written_down_as_what_was_chosen() -> None:
    composition = made({**BLOBS, "clients": {}, "runtime": {"device": "auto", "stack": "auto", "engine": "auto"}})
    runtime = composition.resolved["runtime"]
    assert runtime["engine"] == "stacked" and isinstance(runtime["stack"], int) and runtime["device"] == "cpu"
    assert composition.resolved["clients"]["count"] == 100 and runtime["threads"] == 1


LARGE: dict[str, Any] = {
    "rounds": 1,
    "task": wide(400, 400),
    "clients": {"count": 8},
    "strategy": {"name": "fedavg"},
    "local": {"steps": 1, "batch_size": 10},
}


def test_stacks_follow_the_workers_and_are_written_down() -> None:
    chosen = {w: made({**LARGE, "runtime": {"workers": w}}).resolved["runtime"] for w in (1, 2, 4, 8)}
    assert {w: (r["stack"], r["stacks"]) for w, r in chosen.items()} == {1: (8, 1), 2: (8, 1), 4: (8, 4), 8: (8, 8)}
    for runtime, stacks in (({"stack": 4}, 1), ({"stacks": 3}, 3), ({"stack": 4, "stacks": 2}, 2)):
        composition = made({**LARGE, "runtime": {"workers": 8, **runtime}})
        assert composition.resolved["runtime"]["stacks"] == stacks
    assert composition.plan["stacks"].startswith("2 a round; with 2, 4, 8 workers 2.0, 2.0, 2.0 times")
    with pytest.raises(ConfigError, match="x.yaml: runtime: stacks must be at least 1 or auto, got 0"):
        made({**LARGE, "runtime": {"stacks": 0}})


@pytest.mark.parametrize(("name", "momentum", "vectors"), [("sgd", 0.0, 3), ("sgd", 0.9, 4), ("adamw", None, 5)])
def test_the_memory_of_a_worker_counts_the_state_of_the_optimizer(
    name: str, momentum: float | None, vectors: int
) -> None:
    mib = 8 * vectors * 4 * (400 * 400 + 400 + 400 * 4 + 4) / 2**20  # a stack of eight clients
    rule = {"name": name, "lr": 0.1} | ({} if momentum is None else {"momentum": momentum})
    plan = made({**LARGE, "local": {"steps": 2, "optimizer": rule}, "runtime": {"stack": 8}}).plan
    assert plan["memory"].startswith(f"about {mib:,.1f} MiB a worker")


def test_the_bits_are_those_of_the_file_with_any_number_of_workers() -> None:
    chosen = made({**LARGE, "runtime": {"workers": 4}}).resolved
    runs = [fedsim.run({**chosen, "runtime": {**chosen["runtime"], "workers": w}}) for w in (1, 4)]
    assert runs[0].last("test_loss") == runs[1].last("test_loss")


def test_the_gain_of_workers_is_reckoned_from_the_cut() -> None:
    work = Work(
        cohort_size=4, steps=torch.tensor([1, 2, 1, 3, 0, 2, 1, 1]), batch_size=10, in_factors=False, state_bytes=0
    )
    num_examples = torch.tensor([10, 20, 4, 30, 0, 15, 5, 6])
    # in order of samples 0, 4, 5, 6, 10, 15, 20, 30; every second one: 4, 6, 15, 30 in 1, 1, 2, 3 steps, and one more
    # for coming at all
    assert shares_of(work, num_examples, 2, 1) == [31 + 21, 7 + 5]
    assert shares_of(work, num_examples, 2, 3) == [31 + 21, 7 + 5]
    assert shares_of(work, num_examples, 2, 4) == [31, 21, 7, 5]
    assert [speedup([30, 20, 6, 4], workers) for workers in (1, 2, 3, 8)] == [1, 2, 2, 2]
    assert speedup([5, 4, 3], 2) == 12 / 7 and speedup([0, 0], 2) == 1


def test_the_executor_is_in_process_with_a_worker_a_core_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    for runtime, workers in (({}, 6), ({"threads": 2}, 3), ({"threads": 12}, 1), ({"workers": 4}, 4)):
        executor = made({**BLOBS, "runtime": runtime}).executor
        assert isinstance(executor, InProcess) and executor.workers == workers


def test_local_training_has_the_files_schedule_and_optimizer() -> None:
    raw = {**BLOBS, "rounds": 9, "local": {"steps": 4, "batch_size": "full", "optimizer": {"name": "adam", "lr": 0.5}}}
    local = made(raw).experiment.strategy.local  # type: ignore[attr-defined]
    assert isinstance(local, LocalTraining) and local.rounds == 9 and local.optimizer.lr == 0.5
    assert (local.schedule.steps, local.schedule.epochs, local.schedule.batch_size) == (4, None, None)


def test_the_same_seed_gives_the_same_start_and_another_seed_another() -> None:
    starts = [made({**BLOBS, "seed": s}).experiment.task.init(s) for s in (3, 3, 4)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    made(BLOBS)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_of_a_quadratic_come_one_a_client() -> None:
    task = made({"task": {"name": "quadratic", "a": [1, 3], "b": [0, 1], "x0": 2}}).experiment.task
    assert isinstance(task, QuadraticTask) and task.layout.size == 1 and len(task.num_examples) == 2
    pool: Any = None
    assert task.evaluate(torch.tensor([0.75]), pool)["distance"] == pytest.approx(0, abs=1e-6)  # (0 + 3) / (1 + 3)
    assert float(task.init(0)) == 2.0


def test_a_drawn_task_takes_its_number_of_clients_from_the_file() -> None:
    for name, kind in (("quadratic", QuadraticTask), ("bilinear", BilinearTask)):
        raw = {
            "task": {"name": name, "dim": 3},
            "clients": {"count": 7},
            "strategy": {"name": "extragradient", "lr": 0.1},
        }
        task = made(raw).experiment.task
        assert isinstance(task, kind) and len(task.num_examples) == 7


def test_a_natural_partition_has_as_many_clients_as_the_data_names() -> None:
    raw: dict[str, Any] = {
        "task": {"name": "classification", "dataset": {"name": "synthetic"}, "model": "logistic"},
        "partition": "natural",
    }
    composition = made(raw)
    assert composition.samples is not None
    assert composition.resolved["clients"]["count"] == composition.samples.data.num_clients > 1
    with pytest.raises(ConfigError, match="clients.count=5, but the data has .* natural clients; leave it out"):
        made({**raw, "clients": {"count": 5}})


def test_byzantine_clients_are_drawn_by_the_seed_or_named() -> None:
    def liars(**lies: Any) -> list[int]:
        fleet = made({**BLOBS, "clients": {"count": 20, "byzantine": {"attack": "foe", **lies}}}).experiment.fleet
        return (~fleet.honest(fleet.clients)).nonzero().flatten().tolist()

    assert len(liars(count=4)) == 4 and liars(count=4) == liars(count=4)
    assert liars(ids=[7, 3, 7]) == [3, 7] and liars(count=0) == []
    for everybody in ({"count": 20}, {"ids": [*range(20)]}):
        with pytest.raises(ConfigError, match="clients.byzantine: .* must leave at least one honest client of 20"):
            liars(**everybody)


def test_links_are_compressed_where_the_file_says_so() -> None:
    plain = made(BLOBS).experiment.fleet
    fleet = made({**BLOBS, "uplink": {"compressor": {"name": "top_k", "k": 3}}, "downlink": {"compressor": "natural"}})
    assert plain.downlink is None and fleet.experiment.fleet.downlink is not None  # type: ignore[attr-defined]
    history = fedsim.run({**BLOBS, "uplink": {"compressor": {"name": "top_k", "k": 3}}}, rounds=1)
    # 5 clients send 3 of 28 entries: 32 bits for each value and 5 for each index
    assert 0 < history.last("bits_up") <= 5 * 3 * (32 + 32)


@pytest.mark.parametrize("compressor", [{"name": "powersgd", "rank": 1}, {"name": "per_tensor", "of": "natural"}])
def test_a_compressor_of_the_strategys_own_knows_the_model(compressor: dict[str, Any]) -> None:
    file = {
        **BLOBS,
        "strategy": {"name": "ef21", "compressor": compressor},
        "local": {"steps": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
    }
    assert fedsim.run(file, rounds=2).last("bits_up") > 0


def test_sinks_come_in_the_files_order_after_json_lines() -> None:
    sinks = made({**BLOBS, "log": {"sinks": ["tensorboard", "jsonl"]}}).sinks
    assert [type(s) for s in sinks] == [JsonLines, TensorBoard]


def test_rows_of_clients_lie_on_disk_where_asked(tmp_path: Path) -> None:
    raw = {**BLOBS, "rounds": 2, "strategy": {"name": "scaffold", "cohort_size": 5}, "runtime": {"memory": "disk"}}
    fedsim.run(raw, out=tmp_path / "run")
    assert any((tmp_path / "run" / "memory").iterdir())


@pytest.mark.parametrize(
    "ram, cohort, rounds, expected",
    [(6000, 5, 1, "ram"), (6000, 5, 99, "disk"), (7000, 5, 99, "ram"), (7000, None, 1, "disk"), (9000, None, 1, "ram")],
)
def test_rows_of_clients_lie_in_ram_where_it_surely_has_room(
    ram: int, cohort: int | None, rounds: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 10 clients, 28 numbers in a model: 2 * 4 * 28 bytes for each client that may take part, and once more for a cohort
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": ram}
    monkeypatch.setattr("os.sysconf", lambda name: pages[name])
    raw = {**BLOBS, "rounds": rounds, "clients": {"count": 10}, "strategy": {"name": "fedavg", "cohort_size": cohort}}
    composition = made(raw)
    assert composition.resolved["runtime"]["memory"] == expected
    assert composition.plan["client rows"].startswith("in RAM" if expected == "ram" else "in files")


def test_pre_aggregators_come_as_a_list_and_read_back() -> None:
    strategy = {"name": "fedavg", "cohort_size": 5, "aggregator": "median"}
    raw = {**BLOBS, "strategy": {**strategy, "pre_aggregators": ["bucketing", {"name": "clipping", "norm": 0.5}]}}
    composition = made(raw)
    assert composition.experiment.strategy.pre_aggregators == (Bucketing(size=2), Clipping(norm=0.5))  # type: ignore[attr-defined]
    resolved = composition.resolved["strategy"]["pre_aggregators"]
    assert resolved == [{"name": "bucketing", "size": 2}, {"name": "clipping", "norm": 0.5}]
    runs = [fedsim.run({**c, "rounds": 3}).rows for c in (raw, composition.resolved)]
    assert [r["train_loss"] for r in runs[0]] == [r["train_loss"] for r in runs[1]]


@pytest.mark.parametrize(
    "rules, message",
    [
        ("nnm", r"strategy.pre_aggregators: expected a list such as \[nnm, .*got 'nnm'"),
        (["nmm"], r"strategy.pre_aggregators\[0\].name: unknown name 'nmm'; did you mean 'nnm'"),
        (["bucketing", {"name": "nnm"}], r"strategy.pre_aggregators\[1\].f: missing"),
        (
            [{"name": "nnm", "f": 5}],
            r"strategy.pre_aggregators\[0\]: does not fit 5 replies at a time: nnm needs more rows",
        ),
        ([{"name": "bucketing", "size": 3}], r"strategy.aggregator: does not fit .* leave 2 rows: .*lower f"),
    ],
)
def test_pre_aggregators_that_do_not_fit_are_named_by_their_place(rules: Any, message: str) -> None:
    aggregator = {"name": "trimmed_mean", "f": 1}
    with pytest.raises(ConfigError, match=message):
        made({**BLOBS, "strategy": {**BLOBS["strategy"], "aggregator": aggregator, "pre_aggregators": rules}})


def test_every_schedule_of_the_optimizers_is_listed() -> None:
    assert tuple(TABLES["schedules"]) == get_args(schedules.Name)


def test_the_executors_that_are_listed_are_those_that_the_file_takes() -> None:
    hints = get_type_hints(Runtime)
    assert {"auto", *TABLES["executors"]} == set(get_args(hints["executor"]))


def test_one_million_clients_are_composed_with_100_in_a_round() -> None:
    raw = {
        **BLOBS,
        "task": {**BLOBS["task"], "dataset": {"name": "blobs", "num_examples": 1_250_000, "shape": [2]}},
        "clients": {"count": 1_000_000},
        "strategy": {"name": "fedavg", "cohort_size": 100},
        "evaluate": {"every": 100, "per_client": False},
        "rounds": 2,
    }
    composition = compose(raw, "x.yaml")
    try:
        e = composition.experiment
        state = e.strategy.init(e.task.init(0))
        state, _ = e.strategy.round(state, e.fleet, fedsim.streams.server_rng(0, "server", 0))
        assert torch.isfinite(state.x).all() and e.fleet.end_round().values()["num_clients"] == 100
    finally:
        composition.close()


@pytest.mark.parametrize(
    "topology, words",
    [
        ("ring", "2 neighbours each, 16 messages a step; spectral gap 0.195"),  # (2 - sqrt 2) / 3
        (
            {"name": "exponential", "one_peer": True},
            "1 neighbour each, 8 messages a step; spectral gap 1 a step, over 3 of them",
        ),
        (
            {"name": "edges", "edges": [[0, i] for i in range(1, 8)]},
            "1 to 7 neighbours, 1.8 on average, 14 messages a step; spectral gap 0.125",
        ),
    ],
)
def test_the_plan_says_how_many_neighbours_peers_have_and_how_fast_they_agree(topology: Any, words: str) -> None:
    composition = compose({**pair("dsgd", None), "strategy": {"name": "dsgd", "topology": topology}}, "file")
    e = composition.experiment
    e.strategy.round(e.strategy.init(e.task.init(0)), e.fleet, fedsim.streams.server_rng(0, "server", 0))
    composition.close()
    sent = e.fleet.ledger.bits_up / 1e6
    assert composition.plan["topology"] == words
    assert composition.plan["bits per round"] == f"{sent:,.2f} Mbit between peers for every model-sized message"
