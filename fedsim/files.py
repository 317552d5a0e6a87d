"""Files that are whole or not there, whatever a crash, a kill or a full disk does; and a folder kept to one process."""

from __future__ import annotations

import fcntl
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedsim.config import ConfigError

LOCK_FILE = ".lock"


def write_whole(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file so that after any failure its old content stands, or the new one, and nothing in between.

    Args:
        path: of the file.
        content: what it is to hold, or what writes a file at a path given to it.

    Raises:
        OSError: if it cannot be written.
    """
    put(path, content)
    sync(path.parent)


def put(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """The same for one of many files of a folder, whose names reach the disk when the folder is brought there."""
    part = path.with_name(path.name + ".part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """Write a file of tensors (safetensors) in the same way, from where they lie, with notes in its head.

    Raises:
        OSError: if it cannot be written.
    """

    def save(part: Path) -> None:
        try:
            save_file(dict(tensors), part, None if notes is None else dict(notes))
        except SafetensorError as e:
            raise OSError(f"{part}: {e}") from e

    write_whole(path, save)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder to this process. The system lets go of it when the process ends, however it ends.

    Raises:
        ConfigError: if another process holds it; the message says which.
        OSError: if the folder cannot be written.
    """
    number = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(number, 200).decode(errors="replace") or "another process"
            raise ConfigError(f"{folder} is in use by {holder}; wait until it ends or choose another --out") from None
        except OSError as e:
            warnings.warn(f"{folder}: can't be locked ({e.strerror}); let no other run write there", stacklevel=3)
        else:
            started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
            os.ftruncate(number, 0)
            os.write(number, f"process {os.getpid()} on {platform.node()} since {started}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # the name only informs; closing is what lets go
                os.ftruncate(number, 0)
    finally:
        os.close(number)
