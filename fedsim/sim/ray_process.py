"""Ray in a process of its own, which the run outlives.

Ray ends the process that drives it, at once and past every handler, when the raylet of its machine is gone. Here that
is not the run's process: it starts another, with a new runtime, and hands it the same call again. A call is a pure
function of its jobs, so the bits are those of a run in which nothing died. What Ray itself prints stays off the run's
terminal.

Over a pipe go to Ray's process what it makes its `Driver` of, then questions, each a method of the driver with its
arguments and a stream of parcels, and None at the end; from it parcels, warnings, and how each question ended.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from fedsim import pages
from fedsim.sim.executor import ClientError, Jobs, Lost, Results, StackRunner, T
from fedsim.sim.failure import Failure
from fedsim.sim.packing import Parcel, pack, unpack
from fedsim.sim.pipe import Pipe
from fedsim.sim.ray_driver import Driver
from fedsim.sim.ray_executor import RayExecutor, setting_of
from fedsim.sim.ray_pool import ATTEMPTS, WorkersLost, pickler
from fedsim.sim.ray_runtime import environment

CLOSE_SECONDS = 60.0  # for Ray to stop all that it started
MAIN = "from fedsim.sim.ray_process import main; main()"

_log = logging.getLogger("fedsim")


def ray_executor(runner: StackRunner, **options: Any) -> RayExecutor:
    """Ray actors, driven by a process of their own; by this one where its user has connected it to Ray already.

    Args:
        runner: runs one stack.
        options: of `RayExecutor`.

    Raises:
        ValueError: see `RayProcess`.
    """
    ray = sys.modules.get("ray")
    return (RayExecutor if ray is not None and ray.is_initialized() else RayProcess)(runner, **options)


class RayProcess(RayExecutor):
    """Workers are Ray actors, driven by a process of their own.

    Args: as of `RayExecutor`.

    Raises:
        ValueError: if task or strategy cannot be sent, Ray does not start, or for a mistake in the options.
    """

    def _start(self) -> Any:
        try:
            return _Driver(setting_of(self.runner), self._options)
        except Lost as error:
            raise ValueError(f"Ray does not start on this machine: {error}") from error

    def run(self, jobs: Jobs) -> Results:
        """Run jobs on whichever workers are there; if Ray is lost, again by another.

        Raises:
            ClientError: a client half raised; its own exception is the cause.
            Lost: Ray was lost `ATTEMPTS` times in a row, or does not start again, or its workers were.
        """
        return self._again(f"round {jobs.round + 1}", lambda: super(RayProcess, self).run(jobs))

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        """See `Executor`.

        Raises:
            Lost: as `run`.
        """
        what = f"Task.{self.name_of_method(work)}"
        return self._again(what, lambda: super(RayProcess, self).map(work, pieces, **shared))

    def _again(self, what: str, call: Callable[[], T]) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._driver is not None and self._driver.busy:  # with a call that was left before its end
                    self.close()
                self._driver = self._driver or self._start()
                return call()
            except WorkersLost:
                raise
            except Lost as error:
                self.close()
                lost = f"{what}: Ray was lost ({error})"
                if attempt == ATTEMPTS:
                    raise Lost(f"{lost}, {ATTEMPTS} times in a row") from error
                _log.warning("%s; it starts again, and the call with it", lost)
            except ValueError as error:
                if self._driver is not None:  # it has started, and this is what the call raised
                    raise
                raise Lost(f"{what}: Ray was lost and does not start again: {error}") from error
        raise AssertionError("the last attempt returns or raises")


class _Driver:
    """Ray's process, seen from the run, and asked as the `Driver` in there.

    Attributes:
        busy: whether it is in the middle of a call.

    Raises:
        Lost: if it ended before it was ready; so do the methods if it is gone.
        ValueError: what was refused there.
    """

    def __init__(self, setting: Parcel, options: dict[str, Any]) -> None:
        self._said = tempfile.TemporaryFile()
        here, theirs = socket.socketpair()
        self._pipe = Pipe(here)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **environment(options["threads"])},
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                start_new_session=True,  # Ctrl-C of a terminal is for the run, which ends its round
            )
        try:
            ((self.num_workers, self.least_groups),) = map(unpack, self._ask(options, [setting]))
            self._pipe.shrink()  # of the data set's size nothing else is
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let it stop Ray unless it is in the middle of a call; whatever is left is killed."""
        try:
            if not self.busy:
                self._pipe.send(None)
                self._process.wait(CLOSE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._pipe.close()
        self._said.close()

    def in_order(
        self, method: str, used: Sequence[Sequence[int]], what: Sequence[str], parcels: Iterable[Parcel]
    ) -> Iterator[Parcel]:
        """See `Driver`."""
        return self._ask(("in_order", method, used, what), parcels)

    def members(self) -> int:
        """See `Driver`."""
        (size,) = map(unpack, self._ask(("members",), []))
        return int(size)

    def run_shares(self, parcels: Iterable[Parcel]) -> Iterator[Parcel]:
        """See `Driver`."""
        return self._ask(("run_shares",), parcels)

    def _ask(self, question: Any, parcels: Iterable[Parcel]) -> Iterator[Parcel]:
        self.busy = True
        try:
            self._pipe.send(question)
            for parcel in parcels:
                self._pipe.send(True, parcel)
            self._pipe.send(False)
            while (answer := self._pipe.receive())[0] not in ("end", "failure"):
                if answer[0] == "warning":
                    _log.warning("%s", unpack(answer[1]))
                else:
                    yield answer[1]
        except (EOFError, ConnectionError) as error:
            raise Lost(self._last_words()) from error
        self.busy = False
        if answer[0] == "failure":
            failure = unpack(answer[1])
            raise failure.error from failure.cause

    def _last_words(self) -> str:
        code = self._process.wait()
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - 4096))
        lines = self._said.read().decode(errors="replace").split("\n")
        return f"its process ended with code {code}" + "".join(f": {line}" for line in lines[-2:-1])


# In Ray's process --------------------------------------------------------------------------------------------------


def main() -> None:
    """Drive Ray for the process at the other end of a pipe, until that says so or is gone."""
    pages.keep_freed_memory()
    pipe = Pipe(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGTERM, lambda *_: None)  # a cluster sends it to all processes; the run ends its round
    _log.addHandler(_Teller(pipe))
    _log.propagate = False
    asked: queue.SimpleQueue[tuple[Any, Parcel]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, asked), daemon=True).start()
    options = asked.get()[0]
    try:
        driver = Driver(*_stream(asked), **options)
    except Exception as error:
        return _fail(pipe, error)
    _answer(pipe, (driver.num_workers, driver.least_groups))
    while (question := asked.get()[0]) is not None:
        (method, *args), parcels = question, _stream(asked)
        try:
            _answer(pipe, driver.members() if method == "members" else getattr(driver, method)(*args, parcels))
        except Exception as error:
            _fail(pipe, error)
        for _ in parcels:  # of a call that failed before it took them all
            pass
    driver.close()


def _listen(pipe: Pipe, asked: queue.SimpleQueue[tuple[Any, Parcel]]) -> None:
    """Take in what is asked, and end when nothing more can come, with all of Ray: its agents outlive it by minutes."""
    try:
        while True:
            asked.put(pipe.receive())
    except BaseException as error:  # without this thread the other would wait for ever
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os.killpg(0, signal.SIGKILL)  # this process leads its group


def _stream(asked: queue.SimpleQueue[tuple[Any, Parcel]]) -> Iterator[Parcel]:
    """The parcels of a question."""
    while (message := asked.get())[0]:
        yield message[1]


def _answer(pipe: Pipe, found: Any) -> None:
    for parcel in found if isinstance(found, Iterator) else [pack(found)]:
        pipe.send("parcel", parcel)
    pipe.send("end")


def _fail(pipe: Pipe, error: Exception) -> None:
    # that of a client half was made to travel on the worker already
    told = Failure(error, error.__cause__) if isinstance(error, ClientError) else Failure.of(error)
    pipe.send("failure", pack(told, pickler=pickler()))


class _Teller(logging.Handler):
    """Hands warnings to the run's process, whose logger says them."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self._pipe.send("warning", pack(record.getMessage()))
