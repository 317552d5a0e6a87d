"""Where rows of one shape lie: a tensor in RAM or on a device, or a file.

A store knows slots and nothing of clients. What is read is the reader's own copy, and what is written may come from
any device.

Letters: C rows at hand.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fedsim import pages
from fedsim.config import ConfigError


class Store(Protocol):
    """Rows by slot.

    Attributes:
        shape, dtype: of a row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def make_room(self, needed: int, most: int) -> None:
        """Room for the slots below `needed`; there will never be more than `most`."""

    def read(self, slots: Tensor) -> Tensor:
        """[C, *shape]: the rows in slots [C], which lie on the host; zeros where a slot is -1."""

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Keep rows [C, *shape] in slots [C], for which there is room."""


class InTensor:
    """Rows in one tensor: on the host with room for all that there will ever be, elsewhere it grows by doubling.

    Args:
        shape, dtype: of a row.
        device: where they lie, and where they are read.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype = shape, dtype
        self._device = device
        self._rows = torch.empty(0, *shape, dtype=dtype, device=device)

    def make_room(self, needed: int, most: int) -> None:
        """See `Store`.

        Raises:
            ConfigError: if the device has no room.
        """
        old = self._rows
        if needed <= len(old):
            return
        # on the host what is not touched takes no memory, so that nothing need ever be moved
        capacity = most if self._device.type == "cpu" else max(needed, min(2 * len(old), most))
        size = f"{capacity * prod(self.shape) * self.dtype.itemsize / 1e9:,.1f} GB"
        rows = f"runtime.memory: the rows of {capacity:,} clients ({size}) have"
        with pages.room_on_gpu(rows, "take runtime.memory=ram or disk"):
            self._rows = pages.empty((capacity, *self.shape), self.dtype, self._device)
        self._rows[: len(old)] = old

    def read(self, slots: Tensor) -> Tensor:
        """See `Store`; on the device."""
        here = slots.to(self._device)
        out = self._rows.index_select(0, here.clamp(min=0))
        if bool((slots < 0).any()):  # asked of the host, which does not wait
            out[here < 0] = 0
        return out

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """See `Store`."""
        self._rows.index_copy_(0, slots.to(self._device), rows.to(self._rows))


class Filed:
    """Rows in a file, which takes no more room than the rows that were written.

    They are read and written by calls, not through a mapping: so the process holds no rows but those that it asked for,
    and a full disk is an error to be told of, where a mapping would end the process by a signal.

    Args:
        shape, dtype: of a row.
        path: of the file, which is made anew.

    Raises:
        ConfigError: if the file cannot be made, or takes no more.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> None:
        self.shape, self.dtype = shape, dtype
        self._path, self._row_bytes = path, prod(shape) * dtype.itemsize
        with self._refusals():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        weakref.finalize(self, os.close, self._file)

    def make_room(self, needed: int, most: int) -> None:
        """See `Store`; a file grows by being written to."""

    def read(self, slots: Tensor) -> Tensor:
        """See `Store`; in RAM."""
        out = pages.empty((len(slots), *self.shape), self.dtype)
        out[slots < 0] = 0
        content, size = _bytes(out), self._row_bytes
        for row, slot, count in _stretches(slots.tolist()):
            piece, at = content[row * size : (row + count) * size], slot * size
            while piece:
                got = os.preadv(self._file, [piece], at)
                assert got, "a slot is read after it was written"
                piece, at = piece[got:], at + got
        return out

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """See `Store`."""
        content, size = _bytes(rows.to("cpu", self.dtype).contiguous()), self._row_bytes
        with self._refusals():
            for row, slot, count in _stretches(slots.tolist()):
                piece, at = content[row * size : (row + count) * size], slot * size
                while piece:
                    put = os.pwrite(self._file, piece, at)
                    piece, at = piece[put:], at + put

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise ConfigError(
                f"runtime.memory: disk can't keep rows in {self._path}: {e}; make room, or set runtime.memory=ram, and "
                "add --resume to go on from the last checkpoint"
            ) from e


def _bytes(rows: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, where they lie."""
    return rows.view(-1).view(torch.uint8).numpy().data


def _stretches(slots: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, first slot, how many) of rows that lie side by side; none for slots of -1.

    >>> list(_stretches([4, 5, 9, -1, 0, 1]))
    [(0, 4, 2), (2, 9, 1), (4, 0, 2)]
    """
    first = 0
    for row in range(1, len(slots) + 1):
        if row == len(slots) or slots[row] != slots[row - 1] + 1 or slots[row - 1] < 0:
            if slots[first] >= 0:
                yield first, slots[first], row - first
            first = row
