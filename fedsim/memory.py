"""Rows that clients keep between rounds (control variates, momentum, error feedback, optimizer state).

The store belongs to the server's process: a row is written when its client's reply is received, never before, so
a killed worker or a reply that is never delivered changes nothing. A row is read by whoever runs its client: a thread
reads it from the store, a worker elsewhere gets a copy along with the job. Only clients that wrote a row take room, so
a million registered clients cost one index each. Rows lie in RAM, on the device that computes them, or in a file
(`fedsim.stores`). Checkpoints take rows in blocks and write those that have changed.

Letters: N registered clients, C clients of a stack, M clients that own a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.checkpoint import Block
from fedsim.parts import Parts
from fedsim.stores import Filed, InTensor, Store
from fedsim.terms import Terms

BLOCK_BYTES = 2**20  # of rows in one file of a checkpoint; a larger row has a file to itself


class _Table:
    """Rows of one name: who owns which slot of a store, and in which block of a checkpoint it stands.

    Args:
        num_clients: N.
        store: of the rows.
        rows_per_block: how many rows in a row a checkpoint keeps in one file.
    """

    def __init__(self, num_clients: int, store: Store, rows_per_block: int) -> None:
        self.slot = torch.full((num_clients,), -1, dtype=torch.int64)
        self.owners: list[int] = []
        self.store = store
        self.rows_per_block, self.blocks = rows_per_block, list[Block]()

    def read(self, ids: Tensor) -> Tensor:
        return self.store.read(self.slot[ids])

    def write(self, ids: Tensor, rows: Tensor) -> None:
        fresh = ids[self.slot[ids] < 0]
        if len(fresh):
            start = len(self.owners)
            self.store.make_room(start + len(fresh), len(self.slot))
            self.owners.extend(fresh.tolist())
            self.slot[fresh] = torch.arange(start, len(self.owners))
            while len(self.blocks) * self.rows_per_block < len(self.owners):
                self.blocks.append(Block(partial(self._block, len(self.blocks))))
        slots = self.slot[ids]
        self.store.write(slots, rows)
        for block in torch.unique(slots // self.rows_per_block).tolist():
            self.blocks[block].file = None

    def _block(self, number: int) -> Tensor:
        """A copy of the rows of one block, on the host."""
        start = number * self.rows_per_block
        return self.store.read(torch.arange(start, min(start + self.rows_per_block, len(self.owners)))).cpu()


class Memory:
    """All clients' rows, by name.

    Args:
        num_clients: N.
        folder: where to keep rows in files; None keeps them in tensors.
        device: where those lie.
    """

    def __init__(self, num_clients: int, folder: Path | None = None, device: torch.device | str = "cpu") -> None:
        self.num_clients, self.folder, self.device = num_clients, folder, torch.device(device)
        self.tables: dict[str, _Table] = {}

    def of(self, ids: Tensor) -> Kept:
        """{name: [C, ...]} for some clients, to be read later; zeros for those that never wrote one."""
        return Kept(self, ids)

    def write(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Keep {name: [C, ...]} for these clients, whatever device the rows come from.

        Raises:
            ConfigError: if there is no room for them.
        """
        if isinstance(rows, Parts):
            for index, piece in rows.pieces:
                self.write(ids[index], piece)
            return
        for name, value in rows.items():
            value = value.detach()
            if name not in self.tables:
                nbytes = value[:1].nbytes
                self._add(name, tuple(value.shape[1:]), value.dtype, max(1, BLOCK_BYTES // max(nbytes, 1)))
            table = self.tables[name]
            if tuple(value.shape[1:]) != table.store.shape:
                found, kept = list(value.shape[1:]), list(table.store.shape)
                raise ValueError(f"memory[{name!r}] holds rows of shape {kept}, and one of shape {found} was written")
            table.write(ids.cpu(), value)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, rows_per_block: int) -> _Table:
        store: Store = InTensor(shape, dtype, self.device)
        if self.folder is not None:
            store = Filed(shape, dtype, self.folder / f"{name.replace('/', '_')}.rows")
        self.tables[name] = _Table(self.num_clients, store, rows_per_block)
        return self.tables[name]

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the owners of each name, and their rows in blocks."""
        return {
            name: {
                "owners": torch.tensor(table.owners, dtype=torch.int64),
                "rows_per_block": table.rows_per_block,
                "blocks": list(table.blocks),
            }
            for name, table in self.tables.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, one block at a time."""
        self.tables.clear()
        for name, saved in state.items():
            for ids, block in zip(saved["owners"].split(saved["rows_per_block"]), saved["blocks"], strict=True):
                rows = block.rows()
                known = self.tables.get(name)
                table = known or self._add(name, tuple(rows.shape[1:]), rows.dtype, saved["rows_per_block"])
                table.write(ids, rows)
                table.blocks[-1].file = block.file


class Kept(Mapping[str, Tensor]):
    """{name: [C, ...]} of some clients, copied out of the store when asked for; pickled, it is a dict of copies."""

    def __init__(self, memory: Memory, ids: Tensor) -> None:
        self._memory, self._ids = memory, ids

    def rows(self, index: Tensor) -> Kept:
        """The rows of some of these clients."""
        return Kept(self._memory, self._ids[index])

    def __getitem__(self, name: str) -> Tensor:
        return self._memory.tables[name].read(self._ids)

    def __contains__(self, name: object) -> bool:
        return name in self._memory.tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._memory.tables)

    def __len__(self) -> int:
        return len(self._memory.tables)

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)


class MemoryRows:
    """One stack's rows: what a client half reads and writes.

    `rows["c"]` is [C, P], zeros at first; `rows["c"] = value` keeps it once the reply has been received. Rows of
    another shape are read by `rows.read("name", shape)`.
    """

    def __init__(self, stored: Mapping[str, Tensor], num_rows: int, width: int, device: torch.device) -> None:
        self._stored = stored
        self._read: dict[str, tuple[Tensor, int]] = {}  # rows that were handed out, and their versions by then
        self._num_rows = num_rows
        self._width = width
        self._device = device
        self.written: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, (self._width,))

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """[C, *shape]: the clients' rows, zeros for those that never wrote one."""
        if name in self.written:
            return self.written[name]
        if name not in self._read:
            if name in self._stored:
                rows = self._stored[name].to(self._device)
            else:
                rows = torch.zeros(self._num_rows, *shape, dtype=dtype, device=self._device)
            self._read[name] = rows, rows._version
        return self._read[name][0]

    def __setitem__(self, name: str, rows: Tensor | Terms) -> None:
        rows = rows.dense() if isinstance(rows, Terms) else rows
        if not isinstance(rows, Tensor) or rows.ndim == 0 or rows.shape[0] != self._num_rows:
            found = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"memory[{name!r}] needs one row per client ({self._num_rows}), got {found}")
        self.written[name] = rows

    def handed_out(self) -> list[Tensor]:
        """Rows that were read."""
        return [rows for rows, _ in self._read.values()]

    def check_unwritten(self) -> None:
        """Refuse rows that were changed in place and not kept, as if the store itself had been at hand.

        Raises:
            ValueError: if there are any.
        """
        for name, (rows, version) in self._read.items():
            if rows._version != version and name not in self.written:
                raise ValueError(
                    f"memory[{name!r}] was changed in place, which keeps nothing; assign the new rows to it"
                )

    def __contains__(self, name: str) -> bool:
        return name in self.written or name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._stored, *self.written]))
