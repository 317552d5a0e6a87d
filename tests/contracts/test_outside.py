"""Every kind of part enters by import path, with no change to fedsim."""

from __future__ import annotations

from typing import Any

import pytest

import fedsim
from tests.build import without_wall_time
from tests.contracts import outside
from tests.contracts.outside import USED

HERE = outside.__name__
SMALL: dict[str, Any] = {
    "rounds": 3,
    "task": {"name": "classification", "dataset": {"name": "blobs", "num_examples": 120}, "model": "logistic"},
    "clients": {"count": 6},
    "local": {"steps": 3, "batch_size": 10, "optimizer": {"name": "sgd", "lr": 0.1}},
}


def local(optimizer: dict[str, Any]) -> dict[str, Any]:
    return {"local": {**SMALL["local"], "optimizer": optimizer}}


def task(**changes: Any) -> dict[str, Any]:
    return {"task": {**SMALL["task"], **changes}}


def fedavg(**changes: Any) -> dict[str, Any]:
    return {"strategy": {"name": "fedavg", **changes}}


def clients(**changes: Any) -> dict[str, Any]:
    return {"clients": {"count": 6, **changes}}


PARTS: dict[str, tuple[str, dict[str, Any]]] = {  # its name, and the settings that bring it in
    "strategy": ("Halved", {"strategy": f"{HERE}:Halved"}),
    "optimizer rule": ("Signs", local({"name": f"{HERE}:Signs", "rho": 0.5})),
    "server's rule": ("Signs", fedavg(server_optimizer={"name": f"{HERE}:Signs", "lr": 0.02})),
    "torch optimizer": ("Friction", local({"name": f"{HERE}:Friction", "lr": 0.2})),
    "compressor": ("FirstHalf", {"uplink": {"compressor": f"{HERE}:FirstHalf"}}),
    "aggregator": ("Midrange", fedavg(aggregator=f"{HERE}:Midrange")),
    "pre-aggregator": ("WithoutTheLongest", fedavg(pre_aggregators=[f"{HERE}:WithoutTheLongest"])),
    "selection": ("FirstOnes", fedavg(cohort_size=2, selection=f"{HERE}:FirstOnes")),
    "attack": ("Nothing", clients(byzantine={"attack": f"{HERE}:Nothing", "count": 2})),
    "partition": ("InTurn", {"partition": f"{HERE}:InTurn"}),
    "devices": ("OddAreSlow", clients(devices=f"{HERE}:OddAreSlow")),
    "data set": ("two_moons", task(dataset={"name": f"{HERE}:two_moons", "num_examples": 100})),
    "model": ("Perceptron", task(model={"name": f"{HERE}:Perceptron", "width": 4})),
    "loss": ("squared_error", task(loss=f"{HERE}:squared_error")),
    "engine": ("OneByOne", {"runtime": {"engine": f"{HERE}:OneByOne"}}),
}


def rows_of(**settings: Any) -> list[dict[str, Any]]:
    """What a run logs, without what a clock on the wall says."""
    return without_wall_time(fedsim.run({**SMALL, **settings}).rows)


@pytest.fixture(scope="module")
def plain() -> list[dict[str, Any]]:
    return rows_of()


@pytest.mark.filterwarnings("ignore:.*not batched")
@pytest.mark.parametrize("kind", PARTS)
def test_a_part_of_the_users_own_is_used_and_trains(kind: str, plain: list[dict[str, Any]]) -> None:
    name, settings = PARTS[kind]
    USED.clear()
    rows = rows_of(**settings)
    assert name in USED and rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows != plain or kind == "engine", "it was looked at, but the run is that without it"


def test_peers_take_a_topology_and_lies_of_the_users_own() -> None:
    USED.clear()
    star = {"strategy": {"name": "dsgd", "topology": {"name": f"{HERE}:Star", "centre": 2}}}
    lies = clients(byzantine={"attack": f"{HERE}:Whispers", "ids": [2]})
    history = fedsim.run({**SMALL, "task": {"name": "quadratic", "dim": 3}, **star, **lies})
    assert USED == {"Star", "Whispers"}
    assert history.last("bits_up") == 3 * 2 * 5 * 3 * 32, "three rounds, five links both ways, three numbers each"


def test_a_task_of_the_users_own_is_solved() -> None:
    slope = {"name": f"{HERE}:Slope", "slope": 3.0}
    whole = {"epochs": 1, "batch_size": "full", "optimizer": {"name": "sgd", "lr": 0.05}}
    USED.clear()
    history = fedsim.run({"rounds": 40, "task": slope, "clients": {"count": 4}, "local": whole})
    assert "Slope" in USED and history.last("distance") < 1e-4


def test_the_users_own_parts_do_what_they_say() -> None:
    seconds = fedsim.run({**SMALL, **PARTS["devices"][1]}).last("virtual_seconds")
    assert seconds == 3 * 3 * 2, "three rounds of three steps at the pace of the slow"
    whole, half = (fedsim.run({**SMALL, **part}).last("bits_up") for part in ({}, PARTS["compressor"][1]))
    assert half == whole / 2
    loop, named = (
        fedsim.run({**SMALL, "runtime": {"stack": 1, **r}}).rows
        for r in ({"engine": "loop"}, PARTS["engine"][1]["runtime"])
    )
    assert [r["train_loss"] for r in loop] == [r["train_loss"] for r in named]
