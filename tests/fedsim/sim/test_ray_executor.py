"""The Ray executor gives the bits of the in-process one, whatever dies."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.compress.sparsify import RandK
from fedsim.fleet import Cost
from fedsim.memory import Memory
from fedsim.sim import collectives, ray_pool
from fedsim.sim.collectives import backend_for
from fedsim.sim.devices import Constant
from fedsim.sim.executor import ClientError, Jobs, Results, StackRunner
from fedsim.sim.failure import Failure
from fedsim.sim.fleet import SimFleet
from fedsim.sim.in_process import InProcess
from fedsim.sim.links import Uplink
from fedsim.sim.packing import pack
from fedsim.sim.ray_executor import RayExecutor, setting_of
from fedsim.sim.ray_pool import RayPool
from fedsim.sim.ray_worker import Actor
from tests.fedsim.sim.ray_cases import (
    DIM,
    NUM_CLIENTS,
    arm,
    assert_same_bits,
    once_marked,
    runner,
    some_jobs,
    worker_dies_in,
    worker_dies_in_pieces,
)
from tests.fedsim.sim.runtime import local_runtime

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.ray,
    # Ray leaves log files and child processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

JOBS = {
    "folded": some_jobs(),
    "kept apart": some_jobs(fold=False),
    "from three models": some_jobs(fold=False, num_models=3),
    "of one client": some_jobs().rows(torch.tensor([2])),
    "of nobody": some_jobs().rows(torch.tensor([], dtype=torch.int64)),
}


@pytest.fixture(scope="module")
def runtime() -> Iterator[None]:
    """A runtime that the caller started: executors use it and leave it running."""
    with local_runtime(num_cpus=8):  # the executors of this module hold seven
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a victim can be armed."""
    return tmp_path_factory.mktemp("victim")


@pytest.fixture(scope="module")
def executors(runtime: None, folder: Path) -> Iterator[dict[int, RayExecutor]]:
    """One executor for each number of workers, one client a stack so that stacks share groups."""
    made = {w: RayExecutor(runner(folder), width=1, workers=w, collectives="object_store") for w in (1, 3)}
    yield made
    for executor in made.values():
        executor.close()


@pytest.fixture(scope="module")
def talking(runtime: None, folder: Path) -> Iterator[RayExecutor]:
    """Three workers that fold between them."""
    made = RayExecutor(runner(folder), width=1, workers=3, collectives="gloo")
    yield made
    made.close()


def in_process(jobs: Jobs, *, width: int = 1, workers: int = 1) -> Results:
    executor = InProcess(runner(), width=width, workers=workers)
    try:
        return executor.run(jobs)
    finally:
        executor.close()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", JOBS)
def test_any_number_of_workers_gives_the_bits_of_the_process_itself(
    executors: dict[int, RayExecutor], name: str, workers: int
) -> None:
    expected = in_process(JOBS[name], workers=2)
    assert_same_bits(executors[workers].run(JOBS[name]), expected)
    assert executors[workers].num_workers == workers


def test_results_hold_sums_rows_metrics_and_bits(executors: dict[int, RayExecutor]) -> None:
    got = executors[3].run(JOBS["folded"])
    assert got.sums["delta"].shape == (DIM,)
    assert got.fields["length"].shape == got.metrics["loss"].shape == (100,)
    assert got.memory["c"].shape == (100, DIM)
    assert got.bits_up.tolist() == [32 * DIM + 32] * 100


def test_rounds_through_a_fleet_with_client_memory_are_the_same_bits(executors: dict[int, RayExecutor]) -> None:
    def rounds(executor: RayExecutor | InProcess) -> list[torch.Tensor]:
        shared = runner()
        fleet = SimFleet(
            num_examples=shared.task.num_examples,
            model_size=DIM,
            executor=executor,
            devices=Constant(),
            memory=Memory(NUM_CLIENTS),
            seed=0,
        )
        x, seen = torch.zeros(DIM), []
        for start in (0, 40, 20):
            ids = torch.arange(start, start + 60)
            x = x - fleet.ask(ids, shared.strategy.step, cost=Cost(), x=x)["delta"].mean(0)
            seen.append(x)
        return [*seen, fleet.memory.of(torch.arange(NUM_CLIENTS))["c"]]

    here = InProcess(runner(), width=1)
    for a, b in zip(rounds(here), rounds(executors[3]), strict=True):
        assert torch.equal(a, b)
    here.close()


def test_replies_are_compressed_on_the_workers(runtime: None) -> None:
    whole, here = runner(), runner()
    whole.uplink = here.uplink = Uplink(compressor=RandK(k=5))
    there, process = RayExecutor(whole, width=20, workers=1), InProcess(here, width=20)
    jobs = some_jobs(fold=False)
    got = there.run(jobs)
    assert_same_bits(got, process.run(jobs))
    assert bool((got.fields["delta"] != 0).sum(1).eq(5).all())
    there.close()
    process.close()


def test_the_clients_own_exception_names_clients_work_and_round(executors: dict[int, RayExecutor]) -> None:
    executor = executors[3]
    before = executor._driver.pool.resubmitted
    with pytest.raises(
        ClientError, match=r"^Toy.fail failed in round 5 for client\(s\) 7: ZeroDivisionError: client seven"
    ) as e:
        executor.run(some_jobs("fail"))
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert any("ray_cases.py" in note for note in e.value.__cause__.__notes__)
    assert executor._driver.pool.resubmitted == before, "a client's error is not retried"
    assert_same_bits(executor.run(JOBS["folded"]), in_process(JOBS["folded"]))


def test_an_exception_that_cannot_be_sent_still_tells_its_story(executors: dict[int, RayExecutor]) -> None:
    with pytest.raises(ClientError, match="LocalError: cannot be sent"):
        executors[1].run(some_jobs("fail_oddly"))


def test_a_killed_worker_changes_no_bit(
    executors: dict[int, RayExecutor], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor, before = executors[3], executors[3]._driver.pool.resubmitted
    killer = once_marked(arm(folder), lambda pid: os.kill(pid, signal.SIGKILL))
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        got = executor.run(JOBS["folded"])
    killer.join(10)
    assert_same_bits(got, in_process(JOBS["folded"]))
    assert executor._driver.pool.resubmitted == before + 1
    assert "a worker was lost" in caplog.text and "run again: step in round 5 for client(s)" in caplog.text


def test_pieces_of_the_tasks_own_work_come_back_in_their_order_though_a_worker_is_killed(
    executors: dict[int, RayExecutor], caplog: pytest.LogCaptureFixture
) -> None:
    points = list(torch.linspace(-1, 1, 30 * DIM).view(30, DIM))
    here = [runner().task.evaluate_clients(x, None)["loss"] for x in points]
    for executor in executors.values():
        work = executor.runner.task.evaluate_clients
        for count in (30, 1, 0):
            found = executor.map(work, points[:count], pool=None)
            assert all(torch.equal(a["loss"], b) for a, b in zip(found, here[:count], strict=True))
    executor = executors[3]
    executor._driver.pool.free(60.0)
    executor._driver.pool.ray.get(executor._driver.pool.workers[1].actor.__ray_call__.remote(worker_dies_in_pieces))
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        found = executor.map(executor.runner.task.evaluate_clients, points, pool=None)
    assert all(torch.equal(a["loss"], b) for a, b in zip(found, here, strict=True))
    assert "run again: Task.evaluate_clients" in caplog.text


def test_an_exception_of_the_tasks_own_work_is_raised_here_and_only_its_methods_travel(
    executors: dict[int, RayExecutor],
) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nobody'"):
        executors[3].map(executors[3].runner.task.evaluate_clients, [torch.zeros(DIM)], nobody=None)
    with pytest.raises(ValueError, match="Pool.map: workers elsewhere only know methods of the run's own task, not"):
        executors[3].map(len, [[]])


def test_a_hung_worker_is_replaced_after_its_deadline(
    executors: dict[int, RayExecutor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executors[1]
    monkeypatch.setattr(executor._driver, "timeout_seconds", 3.0)
    mark = arm(folder)
    got = executor.run(JOBS["folded"])
    assert mark.exists(), "the victim did hang"
    assert_same_bits(got, in_process(JOBS["folded"]))
    assert executor._driver.pool.resubmitted == 1


def test_a_group_that_always_loses_its_worker_ends_with_a_clear_error(
    executors: dict[int, RayExecutor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "ATTEMPTS", 1)
    once_marked(arm(folder), lambda pid: os.kill(pid, signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"step in round 5 .* lost its worker 1 times.*lower runtime.stack"):
        executors[3].run(JOBS["folded"])


def test_workers_that_talk_to_each_other_give_the_same_bits(talking: RayExecutor) -> None:
    for jobs in JOBS.values():
        assert_same_bits(talking.run(jobs), in_process(jobs, workers=2))
    assert epochs(talking) == {talking._driver.plane._epoch}, "all three are in one group"


def epochs(executor: RayExecutor) -> set[int]:
    """The groups that the workers are in; 0 is none."""
    return {worker.epoch for worker in executor._driver.pool.workers}


def fold_together(executor: RayExecutor, patch: pytest.MonkeyPatch) -> Results:
    """A folded call that must not need the object store for its sums."""
    with patch.context() as inner:
        inner.setattr(executor, "_apart", None)
        return executor.run(JOBS["folded"])


@pytest.mark.parametrize("where", [*(pytest.param(w, marks=pytest.mark.alone) for w in ("broadcast", "agree")), "fold"])
def test_a_worker_killed_among_talking_ones_changes_no_bit(
    talking: RayExecutor, where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, workers = in_process(JOBS["folded"]), talking._driver.pool.workers
    talking._driver.pool.free(60.0)
    assert_same_bits(fold_together(talking, monkeypatch), expected)
    talking._driver.pool.ray.get(workers[1].actor.__ray_call__.remote(worker_dies_in, where))
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        assert_same_bits(talking.run(JOBS["folded"]), expected)
    assert "the workers' group is dissolved" in caplog.text and "this time" in caplog.text
    assert epochs(talking) == {0}
    assert_same_bits(fold_together(talking, monkeypatch), expected)  # with whoever is there
    assert epochs(talking) - {0}


def test_a_worker_that_hangs_among_talking_ones_is_left_behind(
    talking: RayExecutor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talking._driver.pool.free(60.0)
    monkeypatch.setattr(talking._driver.plane, "_timeout_seconds", 2.0)
    monkeypatch.setattr(talking._driver.plane, "_size", 0)  # a new group, with this deadline
    mark = arm(folder)
    assert_same_bits(talking.run(JOBS["folded"]), in_process(JOBS["folded"]))
    assert mark.exists(), "the victim did hang"


def test_an_exception_among_talking_workers_ends_the_call_for_all(talking: RayExecutor) -> None:
    talking._driver.pool.free(60.0)
    with pytest.raises(ClientError, match=r"^Toy.fail failed in round 5 for client\(s\) 7: ZeroDivisionError"):
        talking.run(some_jobs("fail"))
    assert_same_bits(talking.run(JOBS["folded"]), in_process(JOBS["folded"]))


def test_nccl_without_gpus_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="runtime.collectives: nccl needs a GPU for every worker.*use gloo or auto"):
        RayExecutor(runner(), width=1, collectives="nccl")


def test_how_sums_travel_is_a_rule_on_the_device() -> None:
    assert backend_for("auto", gpus=False) == "gloo" and backend_for("auto", gpus=True) == "nccl"
    assert backend_for("gloo", gpus=True) == "gloo" and backend_for("object_store", gpus=True) is None


def test_few_sums_of_a_large_model_go_through_the_memory_that_workers_share(
    runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "LARGE_BYTES", 4 * DIM)
    executor = RayExecutor(runner(), width=1, workers=1, collectives="auto")
    least = executor._driver.least_groups
    executor.close()
    assert least == 9


def test_a_strategy_that_cannot_be_pickled_is_refused_at_once() -> None:
    whole = runner()
    with pytest.raises(ValueError, match="cannot be sent to Ray workers.*in_process"):
        setting_of(StackRunner(whole.task, (n for n in range(3)), 0, whole.device))


def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout_seconds must be positive, got 0"):
        RayExecutor(runner(), width=1, workers=1, timeout_seconds=0)


class Full:
    """What no card has room for where it is opened."""

    def __reduce__(self) -> Any:
        return full, ()


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_worker_whose_card_is_full_says_so() -> None:
    worker, much = object.__new__(Actor), pack(Full())
    worker._runner = None
    for said in (worker.ready(much), worker.run(pack(None), much, much), worker.map(pack(None), much, much)):
        assert isinstance(said, Failure), "what the pool raises here"
        assert isinstance(said.error, torch.OutOfMemoryError), "the loop says what to lower"


def test_more_workers_than_gpus_of_this_machine_are_refused() -> None:
    pool = object.__new__(RayPool)
    pool.ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 16.0, "GPU": 2.0})
    pool._threads, pool._gpus, pool.others_join = 1, 1, False
    with pytest.raises(ValueError, match=r"runtime.workers: 3 Ray workers were asked for, and this machine has 2 GPU"):
        pool._count(3, joining=False)
    assert pool._count(None, joining=False) == 2


def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    code = """
import sys
from fedsim.sim.ray_executor import RayExecutor
from tests.fedsim.sim.ray_cases import runner
assert "ray" not in sys.modules, "importing the module does not import ray"
for address in ("127.0.0.1:1", "nowhere"):
    try:
        RayExecutor(runner(), width=1, address=address)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    for line, address in zip(done.stdout.splitlines(), ("127.0.0.1:1", "nowhere"), strict=True):
        assert line.startswith(f"runtime.address={address}: cannot join a Ray cluster there")
        assert "ray start --head" in line
