"""Long runs and large federations: memory stays where it was."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import fedsim
from fedsim.compose import compose
from fedsim.overrides import read_file
from fedsim.streams import server_rng

ROOT = Path(__file__).parents[2]
MIB = 2**20


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_flat_over_200_rounds_of_the_quickstart() -> None:
    composition = compose(read_file(ROOT / "configs" / "quickstart.yaml", {"local.epochs": 1}), "quickstart.yaml")
    e = composition.experiment
    state = e.strategy.init(e.task.init(0))
    seen = []
    try:
        for number in range(240):
            state, _ = e.strategy.round(state, e.fleet, server_rng(0, "server", number))
            e.fleet.end_round()
            if number % 5 == 0:
                e.task.evaluate(state.x, e.pool)
                e.task.evaluate_clients(state.x, e.pool)
            if number >= 40 and number % 10 == 0:
                seen.append(resident())
    finally:
        composition.close()
    slope = np.polyfit(np.arange(len(seen)) * 10, seen, 1)[0]
    # a round receives 10 models of 59 KiB: one of them kept a round would be a slope of 60,000 bytes
    assert slope < 20_000, f"{slope:.0f} bytes a round: {[round(s / MIB, 1) for s in seen]}"


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_flat_over_60_runs_in_one_process() -> None:
    config = {
        "rounds": 3,
        "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [20]}},
        "clients": {"count": 10},
        "strategy": {"name": "scaffold", "cohort_size": 4},
        "local": {"steps": 2, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1}},
        "runtime": {"workers": 2},
    }
    seen = []
    for number in range(80):
        fedsim.run(config)
        if number >= 20:
            seen.append(resident())
    slope = np.polyfit(np.arange(len(seen)), seen, 1)[0]
    # a run that kept its engine and what it had compiled for it grew by 217 KiB; kept rows would be 60,000 bytes
    assert slope < 20_000, f"{slope:.0f} bytes a run: {[round(s / MIB, 1) for s in seen]}"


SCRIPT = """
import json, sys, psutil
from fedsim.compose import compose
from fedsim.streams import server_rng

def memory():
    return psutil.Process().memory_info().rss

clients = int(sys.argv[1])
raw = {
    "task": {"name": "quadratic", "dim": 1},
    "clients": {"count": clients},
    "strategy": {"name": "scaffold", "cohort_size": 100},
    "local": {"steps": 2, "optimizer": {"name": "sgd", "lr": 0.1}},
    "runtime": {"workers": 1},
}
composition = compose(raw, "million")
e = composition.experiment
state = e.strategy.init(e.task.init(0))
ready = memory()
for number in range(12):
    state, _ = e.strategy.round(state, e.fleet, server_rng(0, "server", number))
    e.fleet.end_round()
    if number == 1:
        warm = memory()
composition.close()
print(json.dumps({"ready": ready, "rounds": memory() - warm, "rows": len(e.fleet.memory.of(e.fleet.clients[:1]))}))
"""


def measure(clients: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(clients)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_million_registered_clients_cost_a_few_numbers_each_and_rounds_nothing_more() -> None:
    few, many = measure(1_000), measure(1_000_000)
    per_client = (many["ready"] - few["ready"]) / 1e6
    assert per_client < 200, f"{per_client:.0f} bytes for each registered client"
    # ten rounds of 100 clients write at most 1,000 new rows, whatever the size of the federation
    assert many["rounds"] - few["rounds"] < 64 * MIB, (few, many)
