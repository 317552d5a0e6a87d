"""The Ray executor in a process of its own, which the run outlives.

Ray ends the process that drives it, at once and past every handler, when the raylet of its machine is gone. Here that
is not the run's process: it starts another, with a new runtime, and hands it the same call again. A call is a pure
function of its jobs, so the bits are those of a run in which nothing died. What Ray itself prints stays off the run's
terminal.

To Ray's process go the setting and its options, then calls (method of the executor, its arguments, into how many stacks
at least), and None at the end; from it (what, value): how it got ready, what a call gave, and its warnings.
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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedsim import pages
from fedsim.sim.executor import ClientError, Executor, Jobs, Lost, Results, StackRunner, T
from fedsim.sim.failure import Failure
from fedsim.sim.packing import pack, unpack
from fedsim.sim.ray_executor import RayExecutor, setting_of
from fedsim.sim.ray_pool import ATTEMPTS, WorkersLost, pickler
from fedsim.sim.ray_runtime import environment

CLOSE_SECONDS = 60.0  # for Ray to stop all that it started
MAIN = "from fedsim.sim.ray_process import main; main()"

_log = logging.getLogger("fedsim")


def ray_executor(runner: StackRunner, **options: Any) -> RayExecutor | RayProcess:
    """Ray actors, driven by a process of their own; by this one where its user has connected it to Ray already.

    Args:
        runner: runs one stack.
        options: of `RayExecutor`.

    Raises:
        ValueError: see `RayProcess`.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return RayExecutor(runner, **options)
    return RayProcess(runner, **options)


class RayProcess(Executor):
    """Workers are Ray actors, driven by a process of their own.

    Args:
        runner: runs one stack; its task, strategy, seed, device and uplink are sent to every worker once.
        width: clients of a stack.
        threads: intra-op threads of each worker.
        options: of `RayExecutor`.

    Raises:
        ValueError: if task or strategy cannot be sent, Ray does not start, or for a mistake in the options.
    """

    def __init__(self, runner: StackRunner, *, width: int, threads: int = 1, **options: Any) -> None:
        self.runner, self.width = runner, width
        pages.keep_freed_memory()
        self._options = {"width": width, "threads": threads, **options}
        try:
            self._driver: _Driver | None = _Driver(runner, self._options)
        except Lost as error:
            raise ValueError(f"Ray does not start on this machine: {error}") from error
        self.num_workers = self._driver.num_workers

    def run(self, jobs: Jobs) -> Results:
        """Run jobs on whichever workers are there; if Ray is lost, again by another.

        Raises:
            ClientError: a client half raised; its own exception is the cause.
            Lost: Ray was lost `ATTEMPTS` times in a row, or does not start again, or its workers were.
        """
        results: Results = self._call(f"round {jobs.round + 1}", "run", jobs)
        return results

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        """See `Executor`.

        Raises:
            Lost: as `run`.
        """
        name = self.name_of_method(work)
        done: list[T] = self._call(f"Task.{name}", "map_named", name, pieces, shared)
        return done

    def _call(self, what: str, method: str, *args: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._driver = self._driver or _Driver(self.runner, self._options)
                return self._driver.ask((method, args, self.stacks))
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

    def close(self) -> None:
        """Stop Ray, and its process."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None


class _Driver:
    """Ray's process, seen from the run.

    Raises:
        Lost: if it ended before it was ready.
        ValueError: what was refused there.
    """

    def __init__(self, runner: StackRunner, options: dict[str, Any]) -> None:
        setting = setting_of(runner)
        self._pickler = pickler()
        self._said = tempfile.TemporaryFile()
        self._busy = False
        self._socket, theirs = socket.socketpair()
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
            self.num_workers: int = self.ask((setting, options))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let it stop Ray unless it is in the middle of a call; whatever is left is killed."""
        try:
            if not self._busy:
                _send(self._socket, pack(None))
                self._process.wait(CLOSE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        self._socket.close()
        self._said.close()

    def ask(self, question: Any) -> Any:
        """What it answers.

        Raises:
            Lost: if it is gone.
        """
        parcel = pack(question, share=True, pickler=self._pickler)
        self._busy = True
        try:
            _send(self._socket, parcel)
            while (answer := unpack(_receive(self._socket)))[0] == "warning":
                _log.warning("%s", answer[1])
        except (EOFError, ConnectionError) as error:
            raise Lost(self._last_words()) from error
        self._busy = False
        if isinstance(outcome := answer[1], Failure):
            raise outcome.error from outcome.cause
        return outcome

    def _last_words(self) -> str:
        code = self._process.wait()
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - 4096))
        lines = self._said.read().decode(errors="replace").split("\n")
        return f"its process ended with code {code}" + "".join(f": {line}" for line in lines[-2:-1])


# In Ray's process --------------------------------------------------------------------------------------------------


def main() -> None:
    """Drive Ray for the process at the other end of a socket, until that says so or is gone."""
    place = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGTERM, lambda *_: None)  # a cluster sends it to all processes; the run ends its round
    _log.addHandler(_Teller(place))
    _log.propagate = False
    asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(place, asked), daemon=True).start()
    try:
        setting, options = unpack(asked.get())
        executor = RayExecutor(StackRunner(*unpack(setting)), **options)
    except Exception as error:
        return _answer(place, Failure.of(error))
    del setting
    executor.let_go()
    _answer(place, executor.num_workers)
    while (question := unpack(asked.get())) is not None:
        method, args, executor.stacks = question
        try:
            _answer(place, getattr(executor, method)(*args))
        except ClientError as error:
            _answer(place, Failure(error, error.__cause__))  # made to travel on the worker already
        except Exception as error:
            _answer(place, Failure.of(error))
    executor.close()


def _listen(place: socket.socket, asked: queue.SimpleQueue[Any]) -> None:
    """Take in what is asked, and end when nobody is there to ask: Ray's processes end with this one."""
    try:
        while True:
            asked.put(_receive(place))
    except (EOFError, OSError):
        os._exit(1)


def _answer(place: socket.socket, value: Any) -> None:
    _send(place, pack(("answer", value), share=True, pickler=pickler()))


class _Teller(logging.Handler):
    """Hands warnings to the run's process, whose logger says them."""

    def __init__(self, place: socket.socket) -> None:
        super().__init__(logging.WARNING)
        self._place = place

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._place, pack(("warning", record.getMessage())))


# Parcels on a socket -------------------------------------------------------------------------------------------------


def _send(place: socket.socket, parcel: tuple[bytes, list[np.ndarray]]) -> None:
    parts = [np.frombuffer(parcel[0], dtype=np.uint8), *parcel[1]]
    sizes = np.array([len(parts), *(part.nbytes for part in parts)], dtype=np.int64)
    for part in (sizes, *parts):
        place.sendall(part.data.cast("B")) if part.nbytes else None


def _receive(place: socket.socket) -> tuple[bytes, list[np.ndarray]]:
    (count,) = _exactly(place, 8).view(np.int64)
    stream, *buffers = [_exactly(place, int(size)) for size in _exactly(place, 8 * int(count)).view(np.int64)]
    return stream.tobytes(), buffers


def _exactly(place: socket.socket, size: int) -> np.ndarray:
    """So many bytes.

    Raises:
        EOFError: if the other end is gone.
    """
    out = np.empty(size, dtype=np.uint8)
    left = out.data
    while left:
        if not (count := place.recv_into(left)):
            raise EOFError("the other end is closed")
        left = left[count:]
    return out
