"""Flower apps on Ray workers: the rows of the same run in process, however many there are, whichever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fedsim.flower.foreign.nodes import Answer, Job, NodeRunner
from fedsim.flower.foreign.workers import NodeActor, RayNodes
from tests.fedsim.console import fedsim
from tests.fedsim.flower.test_foreign import MESSAGE, NUMPY, own_threads_and_path, played
from tests.fedsim.sim.runtime import local_runtime

__all__ = ["own_threads_and_path"]  # a fixture for each test

pytestmark = [
    pytest.mark.ray,
    # Ray leaves log files and child processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

ROUGH = ("clients.dropout.probability=0.2", "clients.devices=lognormal", "run_config.fail='2'")


@pytest.fixture(scope="module")
def runtime() -> Iterator[None]:
    """One runtime for the module."""
    with local_runtime(num_cpus=3):
        yield


def on_ray(app: Path, out: Path, workers: int) -> list[dict[str, Any]]:
    return played(app, out, *ROUGH, "runtime.executor=ray", f"runtime.workers={workers}")


def dies_in_its_share(actor: NodeActor) -> None:
    """Called in a worker: it answers one message more, and is killed before anybody hears of it."""
    answer = NodeRunner.answer

    def die(self: NodeRunner, job: Job) -> Answer:
        answer(self, job)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it is dead")

    NodeRunner.answer = die  # type: ignore[method-assign]


@pytest.mark.parametrize(("app", "workers"), [pytest.param(MESSAGE, 1, marks=pytest.mark.alone), (NUMPY, 2)])
def test_rows_are_those_of_one_process(app: Path, workers: int, runtime: None, tmp_path: Path) -> None:
    assert on_ray(app, tmp_path / "ray", workers) == played(app, tmp_path / "here", *ROUGH)


@pytest.mark.alone
def test_a_killed_worker_changes_nothing(runtime: None, tmp_path: Path) -> None:
    answers, pools = RayNodes.answers, list[Any]()

    def one_is_killed(self: RayNodes, jobs: Sequence[Job]) -> Iterator[Answer]:
        if not pools:
            pools.append(self.pool)
            self.pool.free(120.0)  # all are ready, and each will have a share
            self.pool.ray.get(self.pool.workers[0].actor.__ray_call__.remote(dies_in_its_share))
        return answers(self, jobs)

    with mock.patch.object(RayNodes, "answers", one_is_killed):
        found = on_ray(MESSAGE, tmp_path / "ray", 3)
    assert found == played(MESSAGE, tmp_path / "here", *ROUGH) and pools[0].resubmitted == 1


def test_what_is_of_ray_workers_alone_is_refused_in_one_process(tmp_path: Path) -> None:
    for key in ("workers=2", "gpus=1", "address=auto"):
        found = fedsim("flower", "run", MESSAGE, "--out", tmp_path / "run", f"runtime.{key}")
        assert found.code == 2 and "is of Ray workers; add executor: ray" in found.err, found.err
    found = fedsim(
        "flower", "run", MESSAGE, "--out", tmp_path / "run", "runtime.executor=ray", "runtime.timeout_seconds=0"
    )
    assert found.code == 2 and "timeout_seconds must be positive" in found.err
    assert not (tmp_path / "run").exists()
