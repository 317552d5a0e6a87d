"""Compressed broadcasts over the wire: what a client is sent, and the running copy that it keeps.

The server's side decides as the simulator's `Downlink` does (it is that very object), and keeps the last packets, so
that a client that missed some is sent those, or the whole vector where that is shorter. The client adds what it gets to
its copy, which it keeps beside its memory. Messages about a vector are numbered: one that comes twice counts once, and
one that never came is noticed.

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

WHOLE, CHANGE = "whole", "change"  # whole/7/x is x as the seventh message about it left it, change/8/x the eighth

Numbered = tuple[int, Tensor]
"""A copy [P], and the number of the message that made it so."""


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
        each = [self._to(name, value, version, last) for last in seen.tolist()]
        return value, each, [c.key for c in changes]

    def forget(self) -> None:
        """Send everybody whole vectors next: clients of a new run have no copies."""
        self.changes.clear()
        for copy in self.downlink.copies.values():
            copy.seen[:] = 0

    def _to(self, name: str, value: Tensor, version: int, seen: int) -> dict[str, Any]:
        """What takes a client that has seen a message of this number, 0 for none, to the newest."""
        changes, missed = self.changes[name], version - seen
        last = changes[-missed:]
        if missed > len(changes) or _length(last) > FLOAT_BITS * value.numel():
            return {f"{WHOLE}/{version}/{name}": value}
        first = version - len(last) + 1
        return {f"{CHANGE}/{first + k}/{name}": change.packet for k, change in enumerate(last)}


def _length(changes: list[Change]) -> int:
    return sum(int(c.packet.bits[0]) for c in changes)


def receive_copies(
    values: Mapping[str, Any], copies: Mapping[str, Numbered]
) -> tuple[dict[str, Numbered], dict[str, Any]]:
    """A client's side.

    Args:
        values: of a message.
        copies: {name: the copy} that the client kept.

    Returns:
        (those of the message's vectors, the broadcast that its client half gets).

    Raises:
        ValueError: for a change of a vector that the client has no copy of, or not the one before.
    """
    broadcast: dict[str, Any] = {}
    about: list[tuple[str, int, Tensor | Packet]] = []
    for key, value in values.items():
        kind, _, rest = key.partition("/")
        if kind in (WHOLE, CHANGE):
            nth, _, name = rest.partition("/")
            about.append((name, int(nth), value))
        else:
            broadcast[key] = value.decode()[0] if isinstance(value, Packet) else value
    new: dict[str, Numbered] = {}
    for name, number, value in sorted(about, key=lambda message: message[:2]):
        if isinstance(value, Tensor):
            new[name] = number, value
            continue
        known, copy = new.get(name) or copies.get(name) or (None, value.decode()[0])
        if known is None or number > known + 1:
            raise ValueError(
                f"change {number} of {name!r} arrived, and no copy after change {number - 1} is here: the node was "
                "started anew, or an earlier message did not reach it"
            )
        new[name] = (known, copy) if number <= known else (number, copy + value.decode()[0])
    return new, broadcast | {name: copy for name, (_, copy) in new.items()}
