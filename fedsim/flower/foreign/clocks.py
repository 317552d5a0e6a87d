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
        on = self.absence.on_line(torch.tensor(nodes) - 1, now)
        return [node for node, there in zip(nodes, on.tolist(), strict=True) if there]

    def ending(self, node: int, number: int, message_type: str, start: float, down: int, up: int) -> Ending:
        """How work ends that begins at this second, on a node's message of this number, with so many bits each way."""
        cost, client = Cost(steps=self.steps.of(message_type), bits_up=up), torch.tensor([node - 1])
        ends = self._timing.ends(client, torch.tensor([number]), start, cost, torch.tensor([down]))
        well = bool(ends.well)
        return Ending(float(ends.at), up if well else int(ends.lost), well)

    def next_change(self, now: float) -> float | None:
        """Virtual second at which one of the nodes comes or goes; None if none ever does."""
        changes = self.absence.availability.changes(self.absence.seed, torch.arange(self.count), now, inf)
        then = float(changes.min())
        return None if then == inf else then
