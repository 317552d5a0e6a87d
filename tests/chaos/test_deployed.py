"""Processes of a Flower deployment, killed at any time: the run ends all the same, and says what it lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedsim import apps, runs
from fedsim.config import ConfigError
from fedsim.flower.deployment import Deployment
from fedsim.strategies import STRATEGIES
from fedsim.strategies.server import Synchronous
from tests.chaos.killing import SEED, generator
from tests.composition import pair
from tests.flower_live.deployment import completed, deployment_in, kill_node, kill_server_app, rows_of, until, wait

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

CASES, ROUNDS, NODES = 8, 3, 2
SECONDS = 400  # in which a run must end, on a busy machine too; Flower notices a node's death after a minute


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment_in(tmp_path_factory.mktemp("deployed"), NODES) as deployment:
        yield deployment


def experiment(strategy: str) -> dict[str, Any]:
    """A run that two devices can take part in."""
    raw = {**pair(strategy, "quadratic task"), "clients": {"count": NODES}, "rounds": ROUNDS}
    return {**raw, "evaluate": {"every": 1}, "runtime": {"stack": 1}, "checkpoint": {"every": 1}}


@cache
def strategies(folder: Path) -> list[str]:
    """Those that wait for replies in rounds, can go on without one, and can be deployed."""
    found = []
    for name, strategy in sorted(STRATEGIES.items()):
        if issubclass(strategy, Synchronous) and strategy.traits.needs_all is None:
            try:
                apps.export(experiment(name), folder / f"app-{name}")
            except ConfigError:
                continue
            found.append(name)
    return found


@pytest.mark.parametrize("case", range(CASES), ids=lambda case: f"deployed-{case}")
def test_a_deployed_run_ends_whatever_is_killed(case: int, deployment: Deployment) -> None:
    rng, names = generator(6, case), strategies(deployment.folder)
    strategy, node = names[rng.integers(len(names))], int(rng.integers(NODES))
    rounds, delay, out = int(rng.integers(ROUNDS - 1)) + 1, 2 * float(rng.random()), deployment.folder / f"run{case}"
    app = deployment.folder / f"app-{strategy}"
    run = deployment.submit(app, {"fedsim-out": str(out)})
    until(deployment, lambda: len(rows_of(out)) >= rounds, SECONDS)
    time.sleep(delay)
    victim = ["ServerApp", f"SuperNode {node}"][case % 2]
    if case % 2:
        kill_node(deployment, node)
    else:
        kill_server_app(deployment)
        assert wait(deployment, run, SECONDS)["status"] != "finished:completed"
        run = deployment.submit(app, {"fedsim-out": str(out), "fedsim-resume": True})
    completed(deployment, run, SECONDS)
    rows = rows_of(out)
    assert len(rows) == ROUNDS
    lost = sum(row.get("num_dropped", 0) for row in rows) + sum(row["num_clients"] < NODES for row in rows)
    if case % 2:
        deployment.start_node(node)
        assert lost, rows
        said = f"{lost} losses reported"
    else:
        assert [row["x"] for row in rows] == [row["x"] for row in runs.run(experiment(strategy)).rows]
        said = "the iterates of the simulator"
    print(f"seed {SEED}, deployed-{case}: {strategy}, {victim} killed {delay:.1f} s after round {rounds}: {said}")
