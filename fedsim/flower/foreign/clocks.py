"""When nodes of a Flower app can be reached, and how long they take: our devices and absence, message by message.

Node i + 1 is client i. A message counts as so many steps of its node's device, whatever its app does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch

from fedsim.fleet import Cost
from fedsim.sim.absence import Absence
from fedsim.sim.devices import Devices
from fedsim.sim.timing import Timing


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a message's work counts as, in steps of its node's device.

    Args:
        train, evaluate, query: of a message of this kind.
    """

    train: int = 1
    evaluate: int = 0
    query: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "evaluate", "query"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more steps, got {getattr(self, name)}")

    def of(self, message_type: str) -> int:
        """Of a message of this type, such as `train` or `train.action`."""
        kinds = {"train": self.train, "evaluate": self.evaluate, "query": self.query}
        return kinds.get(message_type.partition(".")[0], 0)


@dataclass(frozen=True)
class Booking:
    """A node's work on a message.

    Args:
        node: its id.
        number: of the message, among those of the node.
        message_type: of the message.
        start: virtual second at which it begins.
        down, up: bits each way.
    """

    node: int
    number: int
    message_type: str
    start: float
    down: int
    up: int


@dataclass(frozen=True)
class Ending:
    """How a node's work on a message ends.

    Args:
        at: virtual second.
        up: bits of the reply that were sent by then.
        well: whether the reply arrived whole.
    """

    at: float
    up: int
    well: bool


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """See the module's head.

    Args:
        count: N.
        devices: durations.
        steps: what messages count as.
        absence: who is away when, and what dies; it has the run's seed.
    """

    count: int
    devices: Devices
    steps: Steps = Steps()
    absence: Absence = Absence()

    @cached_property
    def _timing(self) -> Timing:
        return Timing(self.devices, self.absence, torch.zeros(self.count), 0, 0, self.absence.seed)

    def on_line(self, nodes: Sequence[int], now: float) -> list[int]:
        """Those of these nodes that can be reached."""
        if not self.absence.away or not nodes:
            return list(nodes)
        on = self.absence.on_line(torch.tensor(nodes) - 1, now)
        return [node for node, there in zip(nodes, on.tolist(), strict=True) if there]

    def endings(self, bookings: Sequence[Booking]) -> list[Ending]:
        """How each of some nodes' work ends."""
        alike: dict[tuple[float, int, int], list[int]] = {}
        for i, booking in enumerate(bookings):
            alike.setdefault((booking.start, self.steps.of(booking.message_type), booking.up), []).append(i)
        found: dict[int, Ending] = {}
        for (start, steps, up), places in alike.items():
            rows = [(bookings[i].node - 1, bookings[i].number, bookings[i].down) for i in places]
            ids, numbers, down = torch.tensor(rows).unbind(1)
            ends = self._timing.ends(ids, numbers, start, Cost(steps=steps, bits_up=up), down)
            for i, at, well, lost in zip(places, ends.at.tolist(), ends.well.tolist(), ends.lost.tolist(), strict=True):
                found[i] = Ending(at, up if well else lost, well)
        return [found[i] for i in range(len(bookings))]

    def next_change(self, now: float) -> float | None:
        """Virtual second at which one of the nodes comes or goes; None if none ever does."""
        changes = self.absence.availability.changes(self.absence.seed, torch.arange(self.count), now, inf)
        then = float(changes.min())
        return None if then == inf else then
