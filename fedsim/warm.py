"""A device's process that stays, for an exported app.

Flower starts a process for every message, and importing torch and composing the experiment take seconds in each. So
that process imports neither: it hands the message to one that it started for the first message of the run, and that
ends when none has come for a while. What a client remembers lies in Flower's context or in the node's folder, never
here, so that it makes no difference to a number whether the process is still there.

They meet at a socket in a folder that is the user's alone, and pass Python objects, which is safe within one user.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fedsim.flower.client import Answer, app_of

IDLE_SECONDS = 120  # until the process ends
BROKEN = (EOFError, ConnectionError, pickle.UnpicklingError)  # what shows that the other end is gone


def client_app(config: Path) -> ClientApp:
    """The app that every SuperNode runs, for an experiment file that lies in the app's package."""
    return app_of(partial(_ask, config))


def _ask(config: Path, kind: str, content: RecordDict, context: Context) -> RecordDict:
    """Have a message answered by the process that stays.

    Raises:
        RuntimeError: if answering it failed there, or that process ended.
    """
    with _connect(config, context) as connection, connection.makefile("rwb") as stream:
        pickle.dump((kind, content, context), stream)
        stream.flush()
        try:
            answer, state = pickle.load(stream)
        except BROKEN as e:
            raise RuntimeError("the process that works for this device has ended, perhaps for lack of memory") from e
    if isinstance(answer, str):
        raise RuntimeError(answer)
    context.state = state
    found: RecordDict = answer
    return found


def _connect(config: Path, context: Context) -> socket.socket:
    """A connection to the process of this app, run and node, which is started if there is none."""
    name = f"{config} {context.run_id} {context.node_id}".encode()
    path = _folder() / blake2b(name, digest_size=8).hexdigest()  # short, since systems take no more than 104 characters
    with suppress(FileNotFoundError, ConnectionRefusedError):
        return _connected(path)
    path.unlink(missing_ok=True)  # of one that was killed
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        arguments = [str(server.fileno()), str(path), str(config), str(IDLE_SECONDS)]
        subprocess.Popen([sys.executable, "-m", "fedsim.warm", *arguments], pass_fds=[server.fileno()])
        return _connected(path)  # and wait in line until it has imported what it needs


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def _folder() -> Path:
    """Where sockets lie.

    Raises:
        RuntimeError: if somebody else could be behind one.
    """
    folder = Path(tempfile.gettempdir()) / f"fedsim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RuntimeError(f"{folder} is not a folder of this user alone; remove it, or set TMPDIR to another place")
    return folder


def _stay(server: socket.socket, path: Path, answer: Answer, idle: float) -> None:
    """Answer messages one after the other, until none has come for so many seconds."""
    for connection in _connections(server, path, idle):
        with suppress(*BROKEN), connection, connection.makefile("rwb") as stream:
            kind, content, context = pickle.load(stream)
            pickle.dump(_outcome(answer, kind, content, context), stream)


def _outcome(answer: Answer, kind: str, content: RecordDict, context: Context) -> tuple[RecordDict | str, RecordDict]:
    """(the answer, or what is to be said of an error; what the context is to hold)."""
    try:
        return answer(kind, content, context), context.state
    except Exception as e:
        traceback.print_exc()
        return f"{type(e).__name__}: {e}", context.state


def _connections(server: socket.socket, path: Path, idle: float) -> Iterator[socket.socket]:
    server.settimeout(idle)
    with suppress(TimeoutError):
        while True:
            yield _accepted(server)
    path.unlink(missing_ok=True)  # nobody finds it from now on, but somebody may just have
    server.settimeout(0)
    with suppress(BlockingIOError):
        while True:
            yield _accepted(server)


def _accepted(server: socket.socket) -> socket.socket:
    connection, _ = server.accept()
    connection.settimeout(None)
    return connection


def main() -> None:
    """The process that stays: its socket, where that lies, the experiment, and for how long it stays."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    number, path, config, idle = sys.argv[1:]
    server = socket.socket(fileno=int(number))
    sys.path.insert(0, str(Path(config).parents[1]))  # modules of the user's own lie there
    from fedsim.apps import answer_of

    _stay(server, Path(path), answer_of(Path(config)), float(idle))


if __name__ == "__main__":
    main()
