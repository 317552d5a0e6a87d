"""Compressed broadcasts over the wire: what a client is sent, and the running copy that it keeps.

The server's side decides as the simulator's `Downlink` does (it is that very object), and keeps the last packets, so
that a client that missed some is sent those, or the whole vector where that is shorter. The client adds what it gets to
its copy, which it keeps beside its memory.

Letters: N clients, P entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsim.compress.packet import FLOAT_BITS, Packet
from fedsim.flower.wire import Key
from fedsim.sim.links import Change, Downlink

WHOLE, CHANGE = "whole/", "change/"  # how a name in a message begins


@dataclass
class Copies:
    """The server's side.

    Args:
        downlink: the rule, and what every client knows.
        changes: {name: the newest messages, the last one last}.
    """

    downlink: Downlink
    changes: dict[str, list[Change]] = field(default_factory=dict)

    def send(
        self, name: str, v: Tensor, ids: Tensor, num_clients: int
    ) -> tuple[Tensor, list[dict[str, Any]], list[Key]]:
        """(what clients end up with [P], the values to send to each of them, keys of the packets)."""
        known = self.downlink.copies.get(name)
        seen = torch.zeros(len(ids), dtype=torch.int64) if known is None else known.seen[ids]
        value, _, change = self.downlink.send(name, v, ids, num_clients)
        changes = self.changes.setdefault(name, [])
        if change is not None:
            changes.append(change)
        while len(changes) > 1 and _length(changes) > FLOAT_BITS * v.numel():
            del changes[0]  # whoever missed that many is sent the vector itself, which is shorter
        version = self.downlink.copies[name].version
        each = [self._to(name, value, version - last if last else None, changes) for last in seen.tolist()]
        return value, each, [c.key for c in changes]

    def forget(self) -> None:
        """Send everybody whole vectors next: clients of a new run have no copies."""
        self.changes.clear()
        for copy in self.downlink.copies.values():
            copy.seen[:] = 0

    def _to(self, name: str, value: Tensor, missed: int | None, changes: list[Change]) -> dict[str, Any]:
        if missed is None or missed > len(changes):
            return {WHOLE + name: value}
        last = changes[len(changes) - missed :]
        if _length(last) > FLOAT_BITS * value.numel():
            return {WHOLE + name: value}
        return {f"{CHANGE}{name}/{k}": change.packet for k, change in enumerate(last)}


def _length(changes: list[Change]) -> int:
    return sum(int(c.packet.bits[0]) for c in changes)


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
