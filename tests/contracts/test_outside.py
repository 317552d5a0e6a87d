"""Every kind of part enters by import path, with no change to fedsim."""

from __future__ import annotations

from typing import Any

import pytest

import fedsim

HERE = "tests.contracts.outside"
SMALL: dict[str, Any] = {
    "rounds": 3,
    "task": {"name": "classification", "dataset": {"name": "blobs", "num_examples": 120}, "model": "logistic"},
    "clients": {"count": 6},
    "local": {"steps": 3, "batch_size": 10, "optimizer": {"name": "sgd", "lr": 0.1}},
}
PARTS: dict[str, dict[str, Any]] = {
    "strategy": {"strategy": f"{HERE}:Halved"},
    "optimizer rule": {"local": {**SMALL["local"], "optimizer": {"name": f"{HERE}:Signs", "rho": 0.5}}},
    "server's rule": {"strategy": {"name": "fedavg", "server_optimizer": {"name": f"{HERE}:Signs", "lr": 0.02}}},
    "torch optimizer": {"local": {**SMALL["local"], "optimizer": {"name": "torch.optim:NAdam", "lr": 0.02}}},
    "compressor": {"uplink": {"compressor": f"{HERE}:FirstHalf"}},
    "aggregator": {"strategy": {"name": "fedavg", "aggregator": f"{HERE}:Midrange"}},
    "pre-aggregator": {"strategy": {"name": "fedavg", "pre_aggregators": [f"{HERE}:WithoutTheLongest"]}},
    "attack": {"clients": {"count": 6, "byzantine": {"attack": f"{HERE}:Nothing", "count": 2}}},
    "partition": {"partition": f"{HERE}:InTurn"},
    "devices": {"clients": {"count": 6, "devices": f"{HERE}:OddAreSlow"}},
    "data set": {"task": {**SMALL["task"], "dataset": {"name": f"{HERE}:two_moons", "num_examples": 100}}},
    "model": {"task": {**SMALL["task"], "model": {"name": f"{HERE}:perceptron", "width": 4}}},
    "loss": {"task": {**SMALL["task"], "loss": "fedsim.engine.losses:cross_entropy"}},
    "engine": {"runtime": {"engine": f"{HERE}:OneByOne"}},
}


@pytest.mark.filterwarnings("ignore:.*not batched")
@pytest.mark.parametrize("kind", PARTS)
def test_a_part_of_the_users_own_trains(kind: str) -> None:
    rows = fedsim.run({**SMALL, **PARTS[kind]}).rows
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_a_task_of_the_users_own_is_solved() -> None:
    task = {"name": f"{HERE}:Slope", "slope": 3.0}
    local = {"epochs": 1, "batch_size": "full", "optimizer": {"name": "sgd", "lr": 0.05}}
    history = fedsim.run({"rounds": 40, "task": task, "clients": {"count": 4}, "local": local})
    assert history.last("distance") < 1e-4


def test_the_users_own_parts_do_what_they_say() -> None:
    seconds = fedsim.run({**SMALL, **PARTS["devices"]}).last("virtual_seconds")
    assert seconds == 3 * 3 * 2, "three rounds of three steps at the pace of the slow"
    whole, half = (fedsim.run({**SMALL, **part}).last("bits_up") for part in ({}, PARTS["compressor"]))
    assert half == whole / 2
    plain, named = (fedsim.run({**SMALL, "runtime": r}).rows for r in ({"engine": "loop"}, PARTS["engine"]["runtime"]))
    assert [r["train_loss"] for r in plain] == [r["train_loss"] for r in named]
