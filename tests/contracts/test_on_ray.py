"""Every strategy of the table gives the same metrics on Ray as in process, however many workers, whichever die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedsim.runs import run
from fedsim.sim.executor import Jobs, Results
from fedsim.sim.packing import Parcel, pack
from fedsim.sim.ray_driver import Driver
from fedsim.sim.ray_executor import RayExecutor
from fedsim.sim.ray_plane import Plane
from fedsim.strategies import STRATEGIES
from tests.build import Rows, without_wall_time
from tests.composition import pair
from tests.fedsim.sim.ray_cases import hang_after_a_stack, once_marked, worker_dies_in
from tests.fedsim.sim.runtime import local_runtime

pytestmark = [
    pytest.mark.ray,
    pytest.mark.alone,
    # Ray leaves log files and child processes to the interpreter's end
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def runtime() -> Iterator[None]:
    """One runtime for the whole table."""
    with local_runtime(num_cpus=3):
        yield


ROUNDS = 10  # after eight arrivals async_fedavg computes its second set of replies


def rows(strategy: str, option: str | None = None, **overrides: Any) -> Rows:
    """The metrics of a short run."""
    history = run({**pair(strategy, option), "rounds": ROUNDS, "runtime": {"stack": 3}}, **overrides)
    return without_wall_time(history.rows)


@cache
def here(strategy: str, option: str | None = None) -> Rows:
    """The same in process."""
    return rows(strategy, option)


def on_ray(strategy: str, option: str | None = None, *, workers: int, collectives: str = "object_store") -> Rows:
    runtime = {"executor": "ray", "workers": workers, "collectives": collectives}
    return rows(strategy, option, **{f"runtime.{k}": v for k, v in runtime.items()})


@pytest.mark.parametrize("option", ["uplink rand_k", "uplink top_k, error feedback", "local AdamW", "label flip"])
def test_what_runs_on_the_clients_beside_the_strategy_runs_on_the_workers(option: str, runtime: None) -> None:
    assert on_ray("fedavg", option, workers=2) == here("fedavg", option) != here("fedavg")


def test_what_is_kept_of_packets_travels_with_the_job(runtime: None) -> None:
    def losses(executor: str, warm: bool) -> Rows:
        power = {"name": "powersgd", "rank": 1, "warm_start": warm}
        more = {"uplink.compressor": power, "uplink.error_feedback": True, "rounds": 3}
        return rows("fedavg", **more, **{"runtime.executor": executor, "runtime.workers": 2})

    assert losses("ray", warm=True) == losses("in_process", warm=True) != losses("in_process", warm=False)


ADAPTED: dict[str, Any] = {
    "seed": 3,
    "rounds": 3,
    "task": {
        "name": "classification",
        "dataset": "digits",
        "model": {"name": "mlp", "hidden": [3000]},
        "lora": {"targets": ["1"], "rank": 2, "dropout": 0.2},
        "train": ["3.bias"],
    },
    "clients": {"count": 6},
    "strategy": {"name": "fedavg", "cohort_size": 4},
    "local": {"steps": 2, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 0.01}},
    "evaluate": {"every": 1},
    "runtime": {"stack": 2},
}


def test_adapters_give_the_same_bits_and_their_base_travels_once(
    runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcels = []

    def noted(*args: Any, **options: Any) -> Parcel:
        parcels.append(parcel := pack(*args, **options))
        return parcel

    expected = without_wall_time(run(ADAPTED).rows)
    monkeypatch.setattr("fedsim.sim.ray_executor.pack", noted)
    there = {"runtime.executor": "ray", "runtime.workers": 2, "runtime.collectives": "object_store"}
    assert without_wall_time(run(ADAPTED, **there).rows) == expected
    trained = 2 * 64 + 3000 * 2 + 10
    assert expected[-1]["bits_up"] == expected[-1]["bits_down"] == 3 * 4 * 32 * trained
    base = 4 * 64 * 3000  # bytes of one frozen weight
    sizes = [len(stream) + sum(b.nbytes for b in buffers) for stream, buffers in parcels]
    # one copy for all workers; then a round sends the model, no inbox and two stacks, and for each of two evaluations
    # the model, and one piece or two
    assert [size > base for size in sizes] == [True] + [False] * 3 * (1 + 1 + 2 + 1 + 1 + 1 + 2)
    assert sum(sizes[1:]) < 3 * 3 * 4 * trained + 27 * 4096


class Killer:
    """From the second round on ends, once for each kind of work, the worker that has just done a stack of it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.marks: dict[str, Path] = {}
        self.resubmitted = 0
        self.jobs: Jobs | None = None
        run, ask, close = RayExecutor.run, Driver._ask, Driver.close
        killer = self

        def note_and_run(executor: RayExecutor, jobs: Jobs) -> Results:
            killer.jobs = jobs
            return run(executor, jobs)

        def arm_and_ask(driver: Driver, worker: Any, method: str, *args: Any) -> Any:
            if method == "run" and killer.jobs and killer.jobs.round >= 1 and killer.jobs.work not in killer.marks:
                killer.arm(driver, worker, killer.jobs.work)
            return ask(driver, worker, method, *args)

        def note_and_close(driver: Driver) -> None:
            killer.resubmitted = max(killer.resubmitted, driver.pool.resubmitted)
            close(driver)

        patch.setattr(RayExecutor, "run", note_and_run)
        patch.setattr(Driver, "_ask", arm_and_ask)
        patch.setattr(Driver, "close", note_and_close)

    def arm(self, driver: Driver, worker: Any, work: str) -> None:
        mark = self.marks[work] = self.folder / work
        driver.pool.ray.get(worker.actor.__ray_call__.remote(hang_after_a_stack, str(mark)))
        once_marked(mark, lambda pid: os.kill(pid, signal.SIGKILL))


ABSENCE = [("fedavg", "absence"), ("fedbuff", "absence"), ("scaffold", "late replies kept")]


@pytest.mark.parametrize(("strategy", "option"), [*((name, None) for name in STRATEGIES), *ABSENCE])
def test_metrics_on_ray_equal_those_in_process_though_workers_are_killed_in_mid_round(
    strategy: str, option: str | None, runtime: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer(tmp_path, monkeypatch)
    workers = 1 + list(STRATEGIES).index(strategy) % 3  # one, two and three take turns over the table
    assert on_ray(strategy, option, workers=workers) == here(strategy, option)
    assert killer.marks and all(mark.exists() for mark in killer.marks.values())
    # Ray may report one death twice, to the call that it cut off and to the next: then that one runs again as well
    assert killer.resubmitted >= len(killer.marks)


@pytest.mark.parametrize(
    ("strategy", "workers"),
    [("fedavg", 1), ("fedavg", 2), ("fedavg", 3), ("scaffold_m", 2), ("scaffold_m", 3), ("monna", 2), ("fedbuff", 3)],
)
def test_metrics_of_workers_that_talk_to_each_other_equal_those_in_process(
    strategy: str, workers: int, runtime: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of several workers is killed in the middle of the third fold."""
    folds, members = [0], Plane.members

    def kill_and_count(plane: Plane) -> int:
        folds[0] += 1
        if folds[0] == 3 and workers > 1:
            actor = plane._pool.workers[-1].actor
            plane._pool.ray.get(actor.__ray_call__.remote(worker_dies_in, "fold"))
        return members(plane)

    monkeypatch.setattr(Plane, "members", kill_and_count)
    assert on_ray(strategy, workers=workers, collectives="gloo") == here(strategy)
    assert folds[0] == (ROUNDS if strategy in ("fedavg", "scaffold_m") else 0), "the others do not fold"
