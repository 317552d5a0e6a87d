"""Worker processes of this machine: each imports and reads data once and then runs one trial after the other.

They are started afresh (spawned), since a forked process cannot use CUDA nor, safely, OpenMP. A worker that dies takes
its trial with it and nothing else: the next trial gets a new one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Protocol

from fedsim.sweep.trials import Ended, Job

REPORT_SECONDS = 0.5  # between two words on how far a trial is
_spawn = get_context("spawn")


@dataclass(frozen=True)
class Word:
    """What a worker has to say of a job: that it ended, how far it is (rounds done), or a warning."""

    job: Job
    ended: Ended | None = None
    round: int = 0
    warning: str = ""


class Workers(Protocol):
    """Runs jobs side by side."""

    words: str

    @property
    def free(self) -> int:
        """How many jobs could be started now."""
        ...

    def start(self, job: Job) -> None:
        """Start a job on a free worker."""
        ...

    def wait(self) -> Sequence[Word]:
        """What is to be said, once there is something."""
        ...

    def stop(self) -> Iterator[Word]:
        """Have every job saved and ended after its round; what they say until then."""
        ...

    def close(self) -> None:
        """End the workers, at once."""
        ...


class Here:
    """One job at a time in this process, with all that its file asks for: threads, Ray's actors, GPUs."""

    words = "one trial at a time in this process"

    def __init__(self) -> None:
        self._job: Job | None = None
        self._words: list[Word] = []

    @property
    def free(self) -> int:
        return int(self._job is None)

    def start(self, job: Job) -> None:
        self._job = job

    def wait(self) -> list[Word]:
        assert self._job is not None
        job = self._job
        ended = job.run(lambda row: None)
        self._job = None
        return [Word(job, ended)]

    def stop(self) -> Iterator[Word]:
        return iter(())

    def close(self) -> None:
        pass


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    job: Job | None = None


class Processes:
    """Worker processes.

    Args:
        count: how many.
        gpus: how many this machine has for them; worker number i computes on GPU i modulo that.
    """

    def __init__(self, count: int, gpus: int = 0) -> None:
        self.words = f"{count} trial{'s' * (count > 1)} at a time, each in a process of its own"
        self._gpus = gpus
        self._workers = [self._started(i) for i in range(count)]
        self._stopping = False

    @property
    def free(self) -> int:
        return sum(worker.job is None for worker in self._workers)

    def start(self, job: Job) -> None:
        worker = next(w for w in self._workers if w.job is None)
        worker.job = job
        try:
            worker.pipe.send(job)
        except OSError:
            pass  # it died while it had nothing to do, which `wait` finds

    def wait(self) -> list[Word]:
        by_pipe = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        return [self._heard(by_pipe[pipe]) for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]

    def stop(self) -> Iterator[Word]:
        self._stopping = True
        for worker in self._workers:
            worker.process.terminate()  # SIGTERM: the running round is finished and saved
        while any(worker.job is not None for worker in self._workers):
            yield from self.wait()

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()  # one that waits for a job ends by itself
            worker.process.terminate() if worker.job is None else worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def _heard(self, worker: _Worker) -> Word:
        job = worker.job
        assert job is not None
        try:
            round, warning, ended = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            code, worker.job = worker.process.exitcode, None
            worker.pipe.close()
            if self._stopping:
                return Word(job, Ended("stopped"))
            self._workers[self._workers.index(worker)] = self._started(self._workers.index(worker))
            how = f"signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"exit code {code}"
            return Word(job, Ended("failed", f"its process ended with {how}; if memory ran out, lower --jobs"))
        if ended is not None:
            worker.job = None
        return Word(job, ended, round, warning)

    def _started(self, number: int) -> _Worker:
        ours, theirs = _spawn.Pipe()
        gpu = number % self._gpus if self._gpus else None
        process = _spawn.Process(target=serve, args=(theirs, gpu), name=f"fedsim-sweep-{number}", daemon=False)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def serve(pipe: Connection, gpu: int | None) -> None:
    """A worker process: run what comes through the pipe until it is closed."""
    # While a trial runs, both end its round. Else Ctrl-C, which reaches every process of a terminal, is the parent's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_follow_parent, daemon=True).start()
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu) if seen is None else seen.split(",")[gpu]
    import fedsim.report  # noqa: F401  all that a trial needs, while the parent still checks the settings
    from fedsim.data.sources import kept

    with kept():
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends by itself
                return
            pipe.send((0, "", _run(job, pipe)))


def _end(number: int, frame: FrameType | None) -> None:
    """End on a signal; a second one must not break into what Python does at its exit."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _run(job: Job, pipe: Connection) -> Ended:
    last = 0.0

    def watch(row: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last > REPORT_SECONDS:
            last = time.monotonic()
            pipe.send((row["round"], "", None))

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        pipe.send((0, str(message), None))

    with warnings.catch_warnings():
        warnings.showwarning = show
        return job.run(watch)


def _follow_parent() -> None:
    """Save and end when the parent has died."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
