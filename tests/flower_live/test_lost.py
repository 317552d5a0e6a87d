"""Processes of a real Flower deployment that are killed in the middle of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from fedsim import apps, runs
from fedsim.flower.deployment import PROFILE, Deployment
from tests.flower_live.deployment import completed, deployment_in, kill_node, kill_server_app, rows_of, until, wait
from tests.flower_live.test_live import COMMON, QUADRATIC

pytestmark = [pytest.mark.flower, pytest.mark.slow]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment_in(tmp_path_factory.mktemp("lost"), num_nodes=2) as deployment:
        yield deployment


def experiment(strategy: str) -> dict[str, Any]:
    return {**COMMON, **QUADRATIC, "rounds": 2, "strategy": {"name": strategy}, "checkpoint": {"every": 1}}


def test_a_server_app_that_was_killed_resumes_to_the_numbers_of_a_simulation(deployment: Deployment) -> None:
    raw, out = experiment("scaffold_m"), deployment.folder / "scaffold_m"
    app = apps.export(raw, deployment.folder / "app-scaffold_m")
    killed = deployment.submit(app, {"fedsim-out": str(out)})
    until(deployment, lambda: len(rows_of(out)) == 1)
    kill_server_app(deployment)  # devices have been sent the second round, and write their memory all the same
    assert wait(deployment, killed, 200)["status"] != "finished:completed"
    run = deployment.submit(app, {"fedsim-out": str(out), "fedsim-resume": True})
    completed(deployment, run, 400)
    assert [row["x"] for row in rows_of(out)] == [row["x"] for row in runs.run(raw).rows]


def test_a_super_node_that_was_killed_costs_its_replies_and_no_more(deployment: Deployment) -> None:
    out = deployment.folder / "fedavg"
    app = apps.export(experiment("fedavg"), deployment.folder / "app-fedavg")
    run = deployment.submit(app, {"fedsim-out": str(out)})
    until(deployment, lambda: len(rows_of(out)) == 1)
    kill_node(deployment, 1)
    completed(deployment, run, 500)
    rows = rows_of(out)
    assert len(rows) == 2 and rows[0]["num_clients"] == 2 and rows[-1]["num_clients"] == 1
    deployment.start_node(1)  # for the next test


def test_where_every_reply_is_needed_a_killed_node_that_comes_back_is_asked_again(deployment: Deployment) -> None:
    raw, out = {**experiment("monna"), "strategy": {"name": "monna", "beta": 0.9}}, deployment.folder / "monna"
    run = deployment.submit(apps.export(raw, deployment.folder / "app-monna"), {"fedsim-out": str(out)})
    until(deployment, lambda: len(rows_of(out)) == 1)
    kill_node(deployment, 1)
    nodes = ("supernode", "list", PROFILE, "--format", "json")
    until(
        deployment, lambda: "offline" in [node["status"] for node in deployment.cli(*nodes)["nodes"]]
    )  # else it is not let in
    time.sleep(10)  # the ServerApp hears of it when it looks next
    deployment.start_node(1)
    completed(deployment, run, 500)
    assert [row["x"] for row in rows_of(out)] == [row["x"] for row in runs.run(raw).rows]
