"""Trials as plain Ray tasks on a cluster.

Not Ray Tune: it would bring folders, checkpoints and a search of its own, and its proposals depend on who finishes
first. A task is all that a trial needs, since Ray keeps a worker process for the next task of the same environment,
with what it has imported and read. A trial whose worker or node is lost is sent again, up to `ATTEMPTS` times.

Where the sweep's folder lies on storage that a node shares, a trial runs in its folder there and goes on from its
checkpoints; elsewhere it runs in a folder of the node, and its files come home when it has ended.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fedsim.config import ConfigError, first_line
from fedsim.data.sources import kept
from fedsim.files import write_whole
from fedsim.sim.ray_runtime import connect, environment
from fedsim.sweep.trials import Ended, Job
from fedsim.sweep.workers import Word

ATTEMPTS = 3
STOP_SECONDS = 60.0  # for a round to end and to be saved


@dataclass(eq=False)
class _Task:
    job: Job
    ref: Any
    attempt: int = 1


class Cluster:
    """Trials on the nodes of a Ray cluster.

    Args:
        address: "auto" or "host:port".
        jobs: at a time; None for as many as the cluster has room for.
        threads: CPUs of each.
        gpus: of each.
        folder: of the sweep.

    Raises:
        ConfigError: if there is no cluster at the address, or no room in it.
    """

    def __init__(self, address: str, *, jobs: int | None, threads: int, gpus: int, folder: Path) -> None:
        import ray

        self._ray, self._folder, self._marker = ray, folder, f".shared-{secrets.token_hex(8)}"
        self._started = connect(ray, address, None, threads, gpus, 0, key="--address")
        total = ray.cluster_resources()
        room = min(int(total.get("CPU", 0) // threads), int(total.get("GPU", 0) // gpus) if gpus else 10**6)
        if not room:
            self._shut()
            raise ConfigError(f"--address {address}: no node has {threads} CPUs and {gpus} GPUs free for a trial")
        self._count = min(jobs or room, room)
        self.words = f"{self._count} trials at a time on a Ray cluster"
        self._run = ray.remote(
            num_cpus=threads,
            num_gpus=gpus,
            max_retries=0,  # they are sent again from here
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment(threads)},
        )(run_away)
        self._tasks: list[_Task] = []
        self._stopping = False

    @property
    def free(self) -> int:
        return self._count - len(self._tasks)

    def start(self, job: Job) -> None:
        (self._folder / self._marker).touch()
        self._tasks.append(_Task(job, self._send(job)))

    def wait(self) -> list[Word]:
        done, _ = self._ray.wait([task.ref for task in self._tasks], num_returns=1, timeout=1.0)
        return [word for task in list(self._tasks) if task.ref in done and (word := self._ended(task)) is not None]

    def stop(self) -> Iterator[Word]:
        self._stopping = True
        for task in self._tasks:
            self._ray.cancel(task.ref)  # is SIGINT to the trial: the running round is finished and saved
        while self._tasks:
            done, _ = self._ray.wait([task.ref for task in self._tasks], num_returns=1, timeout=STOP_SECONDS)
            if not done:
                return
            yield from self.wait()

    def close(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task.ref, force=True)
        (self._folder / self._marker).unlink(missing_ok=True)
        self._shut()

    def _send(self, job: Job) -> Any:
        home = replace(job, folder=job.folder.resolve())
        return self._run.remote(home, self._folder.resolve() / self._marker, os.getcwd())

    def _ended(self, task: _Task) -> Word | None:
        """What became of a task; None if it was sent again."""
        try:
            ended, files = self._ray.get(task.ref)
        except self._ray.exceptions.RayError as e:
            if self._stopping:
                ended, files = Ended("stopped"), {}
            elif task.attempt < ATTEMPTS:
                task.ref, task.attempt = self._send(task.job), task.attempt + 1
                return None
            else:
                ended, files = Ended("failed", f"its worker was lost {ATTEMPTS} times; at last: {first_line(e)}"), {}
        self._tasks.remove(task)
        for name, content in files.items():
            path = task.job.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)
        return Word(task.job, ended)

    def _shut(self) -> None:
        if self._started:
            self._started = False
            self._ray.shutdown()


def run_away(job: Job, marker: Path, started_in: str) -> tuple[Ended, dict[str, bytes]]:
    """A task: how the trial ended, and its files where its folder is not shared."""
    if Path(started_in).is_dir():
        os.chdir(started_in)  # relative paths of the file
    _keep_data()
    if marker.exists():
        return job.run(lambda row: None), {}
    with tempfile.TemporaryDirectory(prefix="fedsim-sweep-") as place:
        folder = Path(place) / "run"
        folder.mkdir()
        ended = replace(job, folder=folder).run(lambda row: None)
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return ended, files


@cache
def _keep_data() -> ExitStack:
    """Keep the data set read last for the tasks that this process still gets."""
    stack = ExitStack()
    stack.enter_context(kept())
    return stack
