"""Objects given from Python in a file's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim.clients.local_training import LocalTraining
from fedsim.compose import compose
from fedsim.compose.identity import identity_of
from fedsim.compose.supervised import Samples
from fedsim.config import ConfigError
from fedsim.data.arrays import from_arrays
from fedsim.data.partition import Iid as IID
from fedsim.engine.losses import LOSSES
from fedsim.overrides import read_file
from fedsim.strategies.fedavg import FedAvg
from tests.build import quadratic, without_wall_time

CONFIG: dict[str, Any] = {
    "rounds": 3,
    "task": {"name": "classification"},
    "clients": {"count": 6},
    "evaluate": {"every": 3, "per_client": False},
    "runtime": {"workers": 1},
}


def numbers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, their classes and their owners."""
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    return (rng.normal(size=(90, 4)) + y[:, None]).astype(np.float32), y, np.arange(90) // 18


def points(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return numbers()[:2]


class Net(nn.Sequential):
    """A model of the user's own, which a file can name."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, width: int = 5) -> None:
        super().__init__(nn.Linear(input_shape[0], width), nn.ReLU(), nn.Linear(width, num_classes))


@dataclass(frozen=True)
class State:
    x: Tensor


@dataclass(frozen=True)
class Still(fedsim.Strategy):
    """Moves the model by some step, and asks nobody."""

    step: float = 0.0

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: fedsim.Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        return State(s.x + self.step), {}


NAMED = {**CONFIG, "task": {"name": "classification", "dataset": f"{__name__}:points", "model": f"{__name__}:Net"}}


def rows(**given: Any) -> list[dict[str, Any]]:
    return without_wall_time(fedsim.run(CONFIG, **given).rows)


def test_what_a_file_can_name_gives_the_same_bits_and_the_same_file_from_python(tmp_path: Path) -> None:
    named = fedsim.run({**NAMED, "strategy": {"name": "fedavg", "cohort_size": 4}}, out=tmp_path / "named")
    given = fedsim.run(CONFIG, data=points, model=Net, strategy=partial(FedAvg, cohort_size=4), out=tmp_path / "given")
    assert without_wall_time(given.rows) == without_wall_time(named.rows)
    files = [read_file(tmp_path / name / "config.yaml") for name in ("named", "given")]
    assert files[0] == files[1] and files[1]["task"]["model"] == {"name": f"{__name__}:Net", "width": 5}
    again = fedsim.run(tmp_path / "given" / "config.yaml")
    assert without_wall_time(again.rows) == without_wall_time(named.rows)


def test_a_module_starts_where_its_parameters_are_and_stays_as_it_is() -> None:
    net = Net((4,), 3)
    before = [p.detach().clone() for p in net.parameters()]
    with fedsim.simulate(CONFIG, data=points(), model=net, strategy=Still()) as simulation:
        assert torch.equal(simulation.state.x, torch.cat([p.flatten() for p in before]))
    history = fedsim.run(CONFIG, data=points(), model=net)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert isinstance(history.model, Net) and not torch.equal(history.model[0].weight, before[0])


def test_data_come_as_arrays_with_owners_or_as_a_data_set() -> None:
    x, y, owners = numbers()
    made = from_arrays(x, y)
    by_owner = fedsim.run(CONFIG, data=(x, y, owners), model=Net, **{"clients.count": None})
    assert by_owner.config["partition"]["name"] == "natural" and by_owner.config["clients"]["count"] == 5
    assert rows(data=(x, y), model=Net) == rows(data=made, model=Net) == rows(data=lambda: (x, y), model=Net)
    assert fedsim.run(CONFIG, data=made, model=Net).config["partition"]["name"] == "iid"
    other = {"partition": {"name": "shards"}}
    assert fedsim.run({**CONFIG, **other}, data=(x, y, owners), model=Net).config["partition"]["name"] == "shards"
    with pytest.raises(ConfigError, match="^config: task.dataset: .*one label per row is needed"):
        fedsim.run(CONFIG, data=(x, y[:-1]))


def test_a_strategy_may_be_an_object_or_a_function_that_takes_what_it_needs() -> None:
    still = fedsim.run(CONFIG, data=points(), model=Net, strategy=Still(step=0.0))
    assert (
        still.config["strategy"] == {"name": f"<object> {__name__}.Still", "step": 0.0} and "local" not in still.config
    )

    def made(local: LocalTraining, count: int) -> FedAvg:
        return FedAvg(local=local, cohort_size=count // 2)

    given = rows(data=points(), model=Net, strategy=made)
    assert given == rows(data=points(), model=Net, strategy={"name": "fedavg", "cohort_size": 3})
    assert given == rows(data=points(), model=Net, strategy=FedAvg, **{"strategy.cohort_size": 3})


def test_sections_keep_their_keyword() -> None:
    history = fedsim.run(
        CONFIG, data={"client_test": 0.2}, strategy="fedprox", model=Net, **{"task.dataset": NAMED["task"]["dataset"]}
    )
    assert history.config["data"]["client_test"] == 0.2 and history.config["strategy"]["name"] == "fedprox"


def test_what_was_given_is_in_the_config_which_then_says_the_way_out(tmp_path: Path) -> None:
    net, folder = Net((4,), 3), tmp_path / "run"
    first = fedsim.run(CONFIG, data=points(), model=net, strategy=Still(0.1), out=folder)
    task = read_file(folder / "config.yaml")["task"]
    assert task["model"] == {"name": f"<object> {__name__}.Net"} and task["dataset"] == {
        "name": "<object> builtins.tuple"
    }
    message = (
        r"config.yaml: task.dataset.name: <object> builtins.tuple was given from Python, where a file can't find it; "
    )
    with pytest.raises(ConfigError, match=message + "give it there again"):
        fedsim.run(folder / "config.yaml")
    more = fedsim.run(CONFIG, data=points(), model=net, strategy=Still(0.1), out=folder, resume=True, rounds=5)
    assert len(more) == 5 and without_wall_time(more.rows)[:2] == without_wall_time(first.rows)[:2]
    assert torch.allclose(more.model[0].bias, first.model[0].bias + 0.2)
    with pytest.raises(ConfigError, match=r"belongs to another config \(strategy differs\)"):
        fedsim.run(CONFIG, data=points(), model=net, strategy=Still(0.2), out=folder, resume=True, rounds=6)
    with pytest.raises(ConfigError, match="task.model.name: <object>"):
        fedsim.History.load(folder).model  # noqa: B018


def test_another_data_set_or_module_of_the_same_class_is_not_gone_on_with(tmp_path: Path) -> None:
    folder, (x, y) = tmp_path / "run", points()
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    given: dict[str, Any] = {"model": net, "data": (x, y), "out": folder, "resume": True}
    fedsim.run(CONFIG, **{**given, "resume": False})
    moved = x.copy()
    moved[7, 2] += 1
    began = r"round-000003: the run began with other data or another model \(data: 72 rows of \[4\], 6 clients, \w+\)"
    for other in ((moved, y), (x, np.roll(y, 1))):
        with pytest.raises(ConfigError, match=began + r" than these \(data: 72 rows of .*\); resume with the same, or"):
            fedsim.run(CONFIG, **{**given, "data": other}, rounds=4)
    other_layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(ConfigError, match=r"\(model: Sequential, 43 numbers that train, \w+\) than these \(model: Seq"):
        fedsim.run(CONFIG, **{**given, "model": other_layers}, rounds=4)
    for layer in net:
        getattr(layer, "reset_parameters", lambda: None)()  # where training starts is in the checkpoint
    assert len(fedsim.run(CONFIG, **given, rounds=4)) == 4


def test_whatever_a_run_reads_of_its_data_or_formula_tells_it_from_another() -> None:
    composition = compose(NAMED, "x")
    composition.close()
    assert composition.samples is not None
    data, net = composition.samples.data, Net((4,), 3)
    offsets = data.offsets.clone()
    offsets[1] += 1  # a row of the second client is the first one's
    changes: list[dict[str, Any]] = [
        {"offsets": offsets},
        {"order": data.order.flip(0)},
        {"targets": data.targets.flip(0)},
        {"test_inputs": data.test_inputs + 1},
        {"test_targets": data.test_targets.roll(1)},
        {"test_owners": torch.zeros(len(data.test_targets), dtype=torch.int64)},
        {"num_classes": 4},
    ]
    found = {
        identity_of(Samples(replace(data, **change), None, net, torch.zeros(0), LOSSES["mse"], {}, {}))["data"]
        for change in [{}, *changes]
    }
    assert len(found) == 1 + len(changes)
    counts = [identity_of(quadratic([1.0, 3.0], [0.0, 1.0], [0.0], num_examples=n)) for n in ([1, 2], [2, 1])]
    assert counts[0] != counts[1]


def test_last_bits_of_another_processor_are_no_other_data_nor_another_model(tmp_path: Path) -> None:
    net, (x, y) = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), points()
    net[0].requires_grad_(False)
    fedsim.run(CONFIG, data=(x, y), model=net, out=tmp_path / "run")
    with torch.no_grad():
        net[0].weight.copy_(torch.nextafter(net[0].weight, torch.tensor(torch.inf)))
    away = np.nextafter(x, np.where(np.arange(x.size).reshape(x.shape) % 2, np.inf, -np.inf).astype(x.dtype))
    assert (away != x).all()
    assert len(fedsim.run(CONFIG, data=(away, y), model=net, out=tmp_path / "run", resume=True, rounds=4)) == 4


def test_another_frozen_base_is_another_model(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    fedsim.run(CONFIG, data=points(), model=net, out=tmp_path / "run")
    with torch.no_grad():
        net[0].weight[0, 0] += 1
    with pytest.raises(
        ConfigError, match="the run began with other data or another model .model: Sequential, 18 numbers"
    ):
        fedsim.run(CONFIG, data=points(), model=net, out=tmp_path / "run", resume=True, rounds=4)


def test_an_object_replaces_the_entry_of_the_file() -> None:
    said = {**NAMED, "strategy": {"name": "fedprox", "mu": 0.1, "cohort_size": 2}}
    said["task"] = {**NAMED["task"], "model": {"name": "mlp", "hidden": [3]}}
    task = fedsim.run(said, model=Net((4,), 3), data=points(), strategy=Still(0.5), **{"local": None}).config["task"]
    assert (task["model"], task["dataset"]) == (
        {"name": f"<object> {__name__}.Net"},
        {"name": "<object> builtins.tuple"},
    )
    with pytest.raises(ConfigError, match="^config: local: <object> .*Still brings its own, so nothing would read"):
        fedsim.run({**CONFIG, "local": {"steps": 3}}, strategy=Still())
    with pytest.raises(ConfigError, match="^config: strategy.step: unknown key"):  # an object has its own fields
        fedsim.run(said, strategy=Still(), **{"strategy.step": 1.0})


def test_a_class_stands_for_its_name_as_on_the_command_line() -> None:
    said = {**NAMED, "strategy": {"name": "fedprox", "mu": 0.1, "cohort_size": 2}}
    with pytest.warns(UserWarning, match=r"^strategy=fedsim.strategies.fedavg:FedAvg drops mu: 0.1 of fedprox"):
        kept = fedsim.run(said, model=Net, strategy=FedAvg).config
    assert kept["strategy"]["name"] == "fedavg" and kept["strategy"]["cohort_size"] == 2
    whole = fedsim.run(said, strategy=partial(FedAvg, cohort_size=4), **{"strategy.server_lr": 0.5}).config["strategy"]
    assert (whole["cohort_size"], whole["server_lr"]) == (4, 0.5)
    fields = fedsim.run({**CONFIG, "strategy": {"cohort_size": 3}}, data=points, model=Net, strategy=FedAvg).config
    assert fields["strategy"]["cohort_size"] == 3


def away(outputs: Tensor, targets: Tensor, *, power: float = 1.0) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none") ** power


def test_functions_and_classes_may_stand_where_a_file_has_their_names() -> None:
    named = {"loss": {"name": f"{__name__}:away", "power": 2.0}, "metrics": [f"{__name__}:away"]}
    given = {"loss": {"name": away, "power": 2.0}, "metrics": [away]}
    runs = [fedsim.run({**NAMED, "task": {**NAMED["task"], **keys}}) for keys in (named, given)]
    assert without_wall_time(runs[0].rows) == without_wall_time(runs[1].rows) and runs[0].config == runs[1].config

    def here(outputs: Tensor, targets: Tensor) -> Tensor:
        return away(outputs, targets)

    changed = {"task.metrics": [here], "local.optimizer": {"name": torch.optim.SGD, "lr": 0.1}, "partition": IID}
    with pytest.warns(UserWarning, match="local.optimizer: torch.optim.sgd:SGD is not batched"):
        history = fedsim.run(NAMED, **changed)
    assert history.last("test_here") > 0 and history.config["partition"] == {"name": "iid"}


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("task.model", nn.Linear(2, 2), "task.model: a Linear can't stand here; .* by model=, data= and strategy="),
        ("local", {"optimizer": {"name": "sgd", "lr": torch.tensor(0.1)}}, "local.optimizer.lr: a Tensor can't stand"),
        ("task.metrics", [nn.MSELoss()], r"task.metrics\[0\]: a MSELoss can't stand here"),
        ("seed", Net, "seed: no function or class can stand here, .*; got tests.fedsim.test_objects:Net"),
    ],
)
def test_what_no_file_could_hold_is_refused_with_its_key(key: str, value: Any, found: str) -> None:
    with pytest.raises(ConfigError, match="^config: " + found):
        fedsim.run(NAMED, **{key: value})


Given = dict[str, Any]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: {"model": "mlp"}, "task.model: model= takes a torch.nn.Module, or a function or class .*, got str"),
        (lambda: {"model": lambda: 3}, "task.model: .*lambda> gave a int, not a torch.nn.Module"),
        (lambda: {"model": nn.Linear(5, 3), "data": points()}, r"task.model: can't take samples of shape \[4\]"),
        (lambda: {"strategy": 3}, "strategy: strategy= takes a fedsim.Strategy, or a class or function .*, got int"),
        (lambda: {"strategy": dict}, "strategy.name: dict is no strategy"),
        (
            lambda: {"strategy": partial(FedAvg, 4)},
            "strategy: strategy= is a partial with places; give its arguments by",
        ),
        (lambda: {"strategy": partial(FedAvg, cohort=4)}, "strategy.cohort: unknown key"),
        (lambda: {"data": 3}, "task.dataset: <object> builtins.int returned int; return a Dataset"),
        (
            lambda: {"data": (points()[0],) * 5},
            "task.dataset: <object> builtins.tuple returned tuple; return a Dataset",
        ),
    ],
)
def test_what_can_not_stand_there_is_refused(given: Callable[[], Given], message: str) -> None:
    with pytest.raises(ConfigError, match="^config: " + message):
        fedsim.run(CONFIG, **given())


def test_objects_that_no_copy_or_no_worker_can_have_are_refused() -> None:
    net, endless = Net((4,), 3), iter(int, 1)
    net.numbers = (n for n in endless)  # type: ignore[assignment]
    with pytest.raises(
        ConfigError, match="task.model: Net can't be copied: TypeError: .*generator.*; give what makes it"
    ):
        fedsim.run(CONFIG, data=points(), model=net)
    held = Still(step=(n for n in endless))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="^the task or the strategy cannot be sent to Ray workers: .*generator.*; keep"
    ):
        fedsim.run(CONFIG, data=points(), model=Net, strategy=held, **{"runtime.executor": "ray"})
