"""A run outlives the runtime of Ray that it started."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fedsim.sim import ray_process
from fedsim.sim.executor import ClientError, Lost
from fedsim.sim.in_process import InProcess
from fedsim.sim.ray_pool import WorkersLost
from fedsim.sim.ray_process import RayProcess
from tests.fedsim.sim.ports import addresses, family
from tests.fedsim.sim.ray_cases import DIM, LocalError, arm, assert_same_bits, once_marked, runner, some_jobs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a victim can be armed."""
    return tmp_path_factory.mktemp("victim")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's home, in which Ray is left to its own settings."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def process(home: Path, folder: Path) -> Iterator[RayProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.sim.pipe.LARGE", 1)  # so that the setting lies in memory of both processes
        made = RayProcess(runner(folder), width=10, workers=2, collectives="object_store")
        pipe = made._driver._pipe
        assert pipe._made and not pipe._mine, "which is not kept"
    yield made
    made.close()


@pytest.fixture(scope="module")
def here() -> Iterator[InProcess]:
    made = InProcess(runner(), width=10)
    yield made
    made.close()


def test_it_gives_the_bits_of_the_process_itself_and_listens_to_this_machine_alone(
    process: RayProcess, here: InProcess, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for jobs in (some_jobs(), some_jobs(fold=False, num_models=3)):
        assert_same_bits(process.run(jobs), here.run(jobs))
    assert process.num_workers == 2
    assert addresses(family()) == {"127.0.0.1"}
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (home / ".ray").exists() and capfd.readouterr() == ("", "")


def test_a_clients_exception_and_its_cause_come_through(process: RayProcess, here: InProcess) -> None:
    with pytest.raises(ClientError, match=r"^Toy.fail failed in round 5 for client\(s\) .*: ZeroDivisionError") as e:
        process.run(some_jobs("fail"))
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    (note,) = e.value.__cause__.__notes__
    assert "ray_cases.py" in note
    with pytest.raises(ClientError, match=f"{LocalError.__name__}: cannot be sent"):
        process.run(some_jobs("fail_oddly"))
    assert_same_bits(process.run(some_jobs()), here.run(some_jobs()))


def test_pieces_of_the_tasks_own_work_come_back_in_their_order(process: RayProcess, here: InProcess) -> None:
    points = list(torch.linspace(-1, 1, 7 * DIM).view(7, DIM))
    there = process.map(process.runner.task.evaluate_clients, points, pool=None)
    for a, b in zip(there, here.map(here.runner.task.evaluate_clients, points, pool=None), strict=True):
        assert torch.equal(a["loss"], b["loss"])
    with pytest.raises(ValueError, match="Pool.map: workers elsewhere only know methods of the run's own task"):
        process.map(len, [[]])
    with pytest.raises(ValueError, match="poisons labels, which this task does not have"):
        process.map(process.runner.task.poison, [torch.tensor([0])], attack=None)


def raylet_of(worker: int) -> psutil.Process:
    """The raylet that started a worker process."""
    return next(p for p in psutil.Process(worker).parents() if p.name() == "raylet")


def children() -> list[psutil.Process]:
    """The processes that drive Ray for this one, and what they have started."""
    drivers = [p for p in psutil.Process().children() if ray_process.MAIN in p.cmdline()]
    family = [one for p in drivers for one in (p, *p.children(recursive=True))]
    return [p for p in family if p.status() != psutil.STATUS_ZOMBIE]


def test_a_raylet_killed_in_mid_call_changes_no_bit(
    process: RayProcess, here: InProcess, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed: list[Any] = []

    def kill(worker: int) -> None:
        killed.append(raylet_of(worker))
        killed[0].kill()

    killer = once_marked(arm(folder), kill)
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        assert_same_bits(process.run(some_jobs()), here.run(some_jobs()))
    killer.join(10)
    assert killed and "round 5: Ray was lost (" in caplog.text


@pytest.mark.alone
def test_a_run_that_is_lost_again_and_again_or_stopped_at_once_leaves_nothing(
    process: RayProcess, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_process, "ATTEMPTS", 1)
    killer = once_marked(arm(folder), lambda worker: raylet_of(worker).kill())
    with pytest.raises(Lost, match="^round 5: Ray was lost .*, 1 times in a row$"):
        process.run(some_jobs())
    killer.join(10)
    assert not children()
    here = threading.main_thread().ident
    assert here is not None
    monkeypatch.setattr(ray_process, "CLOSE_SECONDS", 1e6)  # nobody waits for a call that nobody wants any more
    killer = once_marked(arm(folder), lambda worker: signal.pthread_kill(here, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        process.run(some_jobs())
    killer.join(10)
    family = children()
    process.close()
    assert family and not psutil.wait_procs(family, timeout=60)[1]


@pytest.mark.alone
def test_nothing_of_ray_outlives_a_run_that_was_killed() -> None:
    process = RayProcess(runner(), width=2, workers=1)
    leader = process._driver._process.pid
    family = [p for p in children() if os.getpgid(p.pid) == leader]  # workers lead groups, and end with their raylet
    process._driver._pipe.close()  # as the system does for a process that is gone
    left = psutil.wait_procs(family, timeout=20)[1]
    process.close()
    assert len(family) > 3 and not left, "by themselves Ray's agents stay for minutes"


@pytest.mark.alone
def test_a_mistake_is_refused_as_in_the_process_itself() -> None:
    with pytest.raises(ValueError, match="runtime.collectives: nccl needs a GPU for every worker"):
        RayProcess(runner(), width=1, collectives="nccl")


class Driver:
    """One that raises what a class attribute says, when it starts or when it is asked."""

    num_workers = least_groups = 1
    busy = False
    start: Exception | None = None
    answer: Exception = ValueError("the task's own")

    def __init__(self, *_: Any) -> None:
        if self.start is not None:
            raise self.start

    def members(self) -> int:
        raise self.answer

    def close(self) -> None:
        pass


def test_a_value_error_of_the_call_is_told_from_one_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_process, "_Driver", Driver)
    process = RayProcess(runner(), width=1)
    with pytest.raises(ValueError, match="^the task's own$"):
        process.run(some_jobs())
    monkeypatch.setattr(Driver, "answer", WorkersLost("stack 1 lost its worker 3 times"))
    with pytest.raises(WorkersLost, match="^stack 1 lost its worker 3 times$"):  # and Ray is not started anew
        process.run(some_jobs())
    monkeypatch.setattr(Driver, "answer", Lost("it ended"))
    monkeypatch.setattr(Driver, "start", ValueError("no cluster"))
    with pytest.raises(Lost, match="^round 5: Ray was lost and does not start again: no cluster$"):
        process.run(some_jobs())
