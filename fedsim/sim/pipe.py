"""A connection of two processes of one machine: small things, each with a parcel that nobody opens on the way.

Large buffers of a parcel lie in segments of memory that both processes map, so that they are copied once, by the
sender. The receiver gives a segment back when nobody holds what lies there, and the sender takes it again: fresh pages
cost more than what is copied to them. No folder holds a segment, so nothing is left when both processes are gone.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import tempfile
import weakref
from collections import deque
from typing import Any

import numpy as np

from fedsim.sim.packing import Parcel

LARGE = 1 << 18  # bytes; smaller buffers go through the socket
MOST = 256  # segments of one end, each of which is an open file of both processes; further buffers go as small ones do
NOTHING: Parcel = b"", []


class Pipe:
    """One end. One thread may send while another receives.

    Args:
        end: a connected Unix socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._mine, self._theirs = dict[int, mmap.mmap](), dict[int, mmap.mmap]()  # segments, by number
        self._free = list[int]()  # of mine
        self._back = deque[int]()  # of mine, since the last sending
        self._dropped = list[int]()  # of mine, to be told with the next sending
        self._done = deque[int]()  # of theirs, to be told with the next sending
        self._made = 0

    def send(self, said: Any, parcel: Parcel = NOTHING) -> None:
        """Send something that pickle takes, and a parcel.

        Raises:
            ConnectionError: if the other end is gone.
        """
        stream, buffers = parcel
        new = list[tuple[int, int, int]]()  # (number, size, file)
        try:
            self._take_back()
            places = [(b.nbytes, self._place(b, new) if b.nbytes >= LARGE else None) for b in buffers]
            done = [self._done.popleft() for _ in range(len(self._done))]
            sizes, dropped, self._dropped = [(number, size) for number, size, _ in new], self._dropped, []
            head = pickle.dumps((said, stream, places, sizes, dropped, done))
            self._end.sendall(len(head).to_bytes(8, "little") + head)
            for _, _, file in new:
                socket.send_fds(self._end, [b"\0"], [file])
        finally:
            for _, _, file in new:
                os.close(file)
        for part, (nbytes, number) in zip(buffers, places, strict=True):
            if nbytes and number is None:
                self._end.sendall(part.data.cast("B"))

    def receive(self) -> tuple[Any, Parcel]:
        """What was sent. The buffers of the parcel are the receiver's own, and may be written to.

        Raises:
            EOFError, ConnectionError: if the other end is gone.
        """
        size = int.from_bytes(self._exactly(8), "little")
        said, stream, places, new, dropped, done = pickle.loads(self._exactly(size).data)
        self._back += done
        for number in dropped:
            del self._theirs[number]
        for number, size in new:
            _, files, _, _ = socket.recv_fds(self._end, 1, 1)
            if not files:
                raise EOFError("the other end is closed")
            self._theirs[number] = mmap.mmap(files[0], size)
            os.close(files[0])
        return said, (stream, [self._exactly(n) if number is None else self._lent(number, n) for n, number in places])

    def shrink(self) -> None:
        """Keep no segment that is free, for what comes next is of another size; the other end hears of it next time."""
        self._take_back()
        for number in self._free:
            del self._mine[number]
        self._dropped += self._free
        self._free = []

    def close(self) -> None:
        """Let the other end know that nobody is here."""
        self._end.close()

    def _take_back(self) -> None:
        self._free += [self._back.popleft() for _ in range(len(self._back))]

    def _place(self, part: np.ndarray, new: list[tuple[int, int, int]]) -> int | None:
        """Put a buffer into a segment that is free; where none fits, those that are free make room for a new one."""
        size = 1 << (part.nbytes - 1).bit_length()
        number = next((n for n in self._free if len(self._mine[n]) == size), None)
        if number is None:
            self.shrink()
            if len(self._mine) >= MOST:
                return None
            number, file = self._made, _unnamed(size)
            new.append((number, size, file))
            self._mine[number], self._made = mmap.mmap(file, size), number + 1
        else:
            self._free.remove(number)
        np.frombuffer(self._mine[number], np.uint8, part.nbytes)[:] = part
        return number

    def _lent(self, number: int, nbytes: int) -> np.ndarray:
        """What lies in a segment of theirs, which goes back when nobody here holds it any more."""
        out = np.frombuffer(self._theirs[number], np.uint8, nbytes)  # a base that is no array, so that views hold `out`
        weakref.finalize(out, self._done.append, number)
        return out

    def _exactly(self, size: int) -> np.ndarray:
        """So many bytes of the socket."""
        out = np.empty(size, dtype=np.uint8)
        left = out.data
        while left:
            if not (count := self._end.recv_into(left)):
                raise EOFError("the other end is closed")
            left = left[count:]
        return out


def _unnamed(size: int) -> int:
    """A file of so many bytes that no folder holds, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("parcel")
    else:
        with tempfile.TemporaryFile() as whole:
            file = os.dup(whole.fileno())
    os.ftruncate(file, size)
    return file
