"""Five strategies on a real Flower deployment, against the simulator.

Every phase costs some seconds, because Flower starts a process for every message; so rounds are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fedsim import apps, runs
from fedsim.flower.credentials import write_credentials
from fedsim.tasks.quadratic import QuadraticTask
from tests.fedsim.flower.local_grid import LocalGrid
from tests.fedsim.flower.test_apps import rows_on
from tests.flower_live.deployment import completed, deployment_in, rows_of

pytestmark = [pytest.mark.flower, pytest.mark.slow]

SEED, STEPS, LR, INTERVAL = 1, 4, 0.1, 15.0
COMMON = {"seed": SEED, "clients": {"count": 2}, "evaluate": {"every": 1}, "runtime": {"stack": 1}}
LOCAL = {"steps": STEPS, "batch_size": "full", "optimizer": {"name": "sgd", "lr": LR}}
QUADRATIC = {"task": {"name": "quadratic", "dim": 6}, "local": LOCAL}
RAND_K, TOP_K, QSGD = {"name": "rand_k", "k": 200}, {"name": "top_k", "k": 500}, {"name": "qsgd", "levels": 4}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "fedfix": {**QUADRATIC, "rounds": 2, "strategy": {"name": "fedfix", "interval": INTERVAL, "weights": "identical"}},
    "fedavg": {
        **QUADRATIC,
        "task": {"name": "quadratic", "dim": 2000},
        "rounds": 2,
        "strategy": {"name": "fedavg"},
        "uplink": {"compressor": TOP_K, "error_feedback": True},
    },
    "scaffold_m": {**QUADRATIC, "rounds": 2, "strategy": {"name": "scaffold_m", "beta": 0.5}},
    "monna": {**QUADRATIC, "rounds": 1, "strategy": {"name": "monna", "beta": 0.9}},
    "masha1": {
        "task": {"name": "bilinear", "dim": 150},
        "rounds": 2,
        "strategy": {"name": "masha1", "lr": 0.005, "p": 0.5, "compressor": RAND_K, "server_compressor": QSGD},
    },
}
SETTINGS = {"fedsim-overrides": 'log.sinks=["jsonl"]', "fedsim-max-examples": 1000}  # what is so in any case
DETERMINISTIC = [name for name in EXPERIMENTS if name != "fedfix"]


def experiment(name: str) -> dict[str, Any]:
    return {**COMMON, **EXPERIMENTS[name]}


ENVELOPE = 2500  # bytes of a message beside its vectors, with Flower's own data about it and its parts


class Deployed(NamedTuple):
    """By strategy: the rows of metrics.jsonl, and what Flower says of the run."""

    rows: dict[str, list[dict[str, Any]]]
    states: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Five runs: the one that looks at the clock, then the others at once."""
    folder = tmp_path_factory.mktemp("deployment")
    write_credentials(folder, num_nodes=3)
    with deployment_in(folder, num_nodes=2) as deployment:
        stranger = deployment.start_node(2)
        states = {}
        for names in (["fedfix"], DETERMINISTIC):
            submitted = []
            for name in names:
                app = apps.export(experiment(name), folder / f"app-{name}")
                submitted.append(deployment.submit(app, {**SETTINGS, "fedsim-out": str(folder / name)}))
            for name, number in zip(names, submitted, strict=True):
                states[name] = completed(deployment, number, 600)
        found = {name: rows_of(folder / name) for name in EXPERIMENTS}
        assert stranger.poll() not in (None, 0), "a node with an unregistered key was let in"
        yield Deployed(found, states)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deployed_run_gives_the_simulators_iterates(name: str, deployed: Deployed) -> None:
    simulated = runs.run(experiment(name)).rows
    rows = deployed.rows[name]
    assert len(rows) == len(simulated) == EXPERIMENTS[name]["rounds"]
    for row, expected in zip(rows, simulated, strict=True):
        assert row.get("x") == expected.get("x")
        assert row["distance"] == expected["distance"]
        if name != "monna":  # its exchange is relayed, which costs other bits than links between peers
            assert (row["bits_up"], row["bits_down"]) == (expected["bits_up"], expected["bits_down"])


@pytest.mark.parametrize("name", ["fedavg", "masha1"])
def test_flower_counts_the_ledgers_bytes_and_envelopes(name: str, deployed: Deployed) -> None:
    grid = LocalGrid(apps.client_app(experiment(name)), 2)
    row = rows_on(grid, experiment(name))[-1]
    traffic = deployed.states[name]["network-traffic"]
    for way, bits in (("inbound", row["bits_up"]), ("outbound", row["bits_down"])):
        assert 1000 < (traffic[f"{way}-bytes"] - bits / 8) / grid.num_messages < ENVELOPE, way


def test_fedfix_on_the_wall_clock_follows_one_of_the_possible_schedules(deployed: Deployed) -> None:
    rows = deployed.rows["fedfix"]
    task = QuadraticTask.drawn(2, 6, SEED)
    assert [INTERVAL * k <= row["virtual_seconds"] < INTERVAL * (k + 1) for k, row in enumerate(rows, 1)] == [True] * 2
    assert sum(row["num_clients"] for row in rows) > 0

    def possible(x: Tensor, started: dict[int, Tensor], left: list[dict[str, Any]]) -> bool:
        """Whether some choice of who arrives in each window leads to the rows that are left."""
        if not left:
            return True
        for arrived in ([], [0], [1], [0, 1]):
            new = x - sum((0.5 * delta(task, i, started[i]) for i in arrived), torch.zeros_like(x))
            close = torch.allclose(new, torch.tensor(left[0]["x"]), rtol=0, atol=1e-6)
            if len(arrived) == left[0]["num_clients"] and close:
                if possible(new, started | {i: new for i in arrived}, left[1:]):
                    return True
        return False

    assert possible(task.x0, {0: task.x0, 1: task.x0}, rows)


def delta(task: QuadraticTask, i: int, x: Tensor) -> Tensor:
    """x minus the local model after gradient descent from x."""
    y = x
    for _ in range(STEPS):
        y = y - LR * task.a[i] * (y - task.b[i])
    return x - y


def test_results_stand_in_a_run_folder_like_any_other(
    deployed: Deployed, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = next(tmp_path_factory.getbasetemp().glob("deployment*")) / "fedavg"
    assert {"config.yaml", "metrics.jsonl", "summary.json", "model.safetensors", "report.html"} <= {
        p.name for p in folder.iterdir()
    }
