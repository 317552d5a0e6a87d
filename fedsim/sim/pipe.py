"""A connection of two processes of one machine: small things, each with a parcel that nobody opens on the way."""

from __future__ import annotations

import pickle
import socket
from typing import Any

import numpy as np

from fedsim.sim.packing import Parcel

NOTHING: Parcel = b"", []


class Pipe:
    """One end.

    Args:
        end: a connected socket.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, said: Any, parcel: Parcel = NOTHING) -> None:
        """Send something that pickle takes, and a parcel.

        Raises:
            ConnectionError: if the other end is gone.
        """
        stream, buffers = parcel
        head = pickle.dumps((said, stream, [part.nbytes for part in buffers]))
        self._end.sendall(len(head).to_bytes(8, "little") + head)
        for part in buffers:
            if part.nbytes:
                self._end.sendall(part.data.cast("B"))

    def receive(self) -> tuple[Any, Parcel]:
        """What was sent. The buffers of the parcel are the receiver's own, and may be written to.

        Raises:
            EOFError, ConnectionError: if the other end is gone.
        """
        size = int.from_bytes(self._exactly(8), "little")
        said, stream, sizes = pickle.loads(self._exactly(size).data)
        return said, (stream, [self._exactly(size) for size in sizes])

    def close(self) -> None:
        """Let the other end know that nobody is here."""
        self._end.close()

    def _exactly(self, size: int) -> np.ndarray:
        """So many bytes."""
        out = np.empty(size, dtype=np.uint8)
        left = out.data
        while left:
            if not (count := self._end.recv_into(left)):
                raise EOFError("the other end is closed")
            left = left[count:]
        return out
