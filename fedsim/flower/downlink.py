"""Compressed broadcasts over the wire: what a client is sent, and the running copy that it keeps.

The server's side decides as the simulator's `Downlink` does (it is that very object), and keeps the last packets, so
that a client that missed some is sent those, or the whole vector where that is shorter. The client adds what it gets to
its copy, which it keeps beside its memory.

Letters: N clients, P entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.compress.packet import Compressor, Packet
from fedsim.flower.wire import Key
from fedsim.sim.links import FLOAT_BITS, Copy, Downlink
from fedsim.streams import Streams

WHOLE, CHANGE = "whole/", "change/"  # how a name in a message begins


@dataclass
class Note:
    """A packet that was made, and the key of its random numbers."""

    packet: Packet
    key: Key


@dataclass
class Notebook:
    """A compressor that notes what it makes."""

    compressor: Compressor
    notes: list[Note] = field(default_factory=list)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        """As the compressor's own."""
        packet = self.compressor.encode(v, streams, step)
        self.notes.append(Note(packet, (streams.seed, int(streams.clients[0]), int(streams.jobs[0]), step)))
        return packet


@dataclass
class Copies:
    """The server's side.

    Args:
        downlink: the rule, and what every client knows.
        notes: {name: the newest packets, the last one last}.
    """

    downlink: Downlink
    notes: dict[str, list[Note]] = field(default_factory=dict)

    def send(
        self, name: str, v: Tensor, ids: Tensor, num_clients: int
    ) -> tuple[Tensor, list[dict[str, Any]], list[Key]]:
        """(what clients end up with [P], the values to send to each of them, keys of the packets)."""
        known = self.downlink.copies.get(name)
        seen = torch.zeros(num_clients, dtype=torch.int64) if known is None else known.seen.clone()
        book = Notebook(self.downlink.compressor)
        value, _ = replace(self.downlink, compressor=book).send(name, v, ids, num_clients)  # type: ignore[arg-type]
        copy = self.downlink.copies[name]
        notes = self.notes.setdefault(name, [])
        if book.notes:
            notes += book.notes
            del notes[: -self._useful(notes)]
        each = [self._to(name, copy, copy.version - int(seen[i]), bool(seen[i] > 0), notes) for i in ids.tolist()]
        return value, each, [n.key for n in notes]

    def forget(self) -> None:
        """Send everybody whole vectors next: clients of a new run have no copies."""
        self.notes.clear()
        for copy in self.downlink.copies.values():
            copy.seen[:] = 0

    def _useful(self, notes: list[Note]) -> int:
        """How many packets together are no longer than the vector itself."""
        shortest = min(int(n.packet.bits[0]) for n in notes)
        return max(1, FLOAT_BITS * notes[-1].packet.num_entries // max(shortest, 1))

    def _to(self, name: str, copy: Copy, missed: int, has_copy: bool, notes: list[Note]) -> dict[str, Any]:
        last = notes[len(notes) - missed :] if missed <= len(notes) else []
        length = sum(int(n.packet.bits[0]) for n in last)
        if not has_copy or len(last) < missed or length > FLOAT_BITS * copy.value.numel():
            return {WHOLE + name: copy.value}
        return {f"{CHANGE}{name}/{k}": note.packet for k, note in enumerate(last)}


def receive_copies(values: Mapping[str, Any], copies: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A client's side.

    Args:
        values: of a message.
        copies: {name: [P]} that the client kept.

    Returns:
        (those that changed, the broadcast that its client half gets).

    Raises:
        ValueError: for a change of a vector that the client has no copy of.
    """
    new: dict[str, Tensor] = {}
    broadcast: dict[str, Any] = {}
    changes: list[tuple[str, int, Packet]] = []
    for key, value in values.items():
        if key.startswith(WHOLE):
            new[key.removeprefix(WHOLE)] = value
        elif key.startswith(CHANGE):
            name, _, k = key.removeprefix(CHANGE).partition("/")
            changes.append((name, int(k), value))
        else:
            broadcast[key] = value.decode()[0] if isinstance(value, Packet) else value
    for name, _, packet in sorted(changes, key=lambda change: change[:2]):
        before = new.get(name, copies.get(name))
        if before is None:
            raise ValueError(f"a change of {name!r} arrived and no copy of it is here: the node was started anew")
        new[name] = before + packet.decode()[0]
    return new, broadcast | new
