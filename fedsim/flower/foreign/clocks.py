"""When nodes of a Flower app can be reached, and how long they take: our devices and absence, message by message.

Node i + 1 is client i. A message counts as so many steps of its node's device, whatever its app does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from fedsim.sim.absence import Absence
from fedsim.sim.devices import Devices
from fedsim.streams import Streams


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
        devices: durations.
        steps: what messages count as.
        absence: who is away when, and what dies; it has the run's seed.
    """

    devices: Devices
    steps: Steps = Steps()
    absence: Absence = Absence()

    def on_line(self, nodes: Sequence[int], now: float) -> list[int]:
        """Those of these nodes that can be reached."""
        on = self.absence.on_line(torch.tensor(nodes) - 1, now)
        return [node for node, there in zip(nodes, on.tolist(), strict=True) if there]

    def ending(self, node: int, number: int, message_type: str, start: float, down: int, up: int) -> Ending:
        """How work ends that begins at this second, on a node's message of this number, with so many bits each way."""
        clients, numbers = _clients(node), torch.tensor([number])
        streams, steps = Streams(self.absence.seed, clients, numbers), _double(self.steps.of(message_type))
        finish = start + self.devices.seconds(streams, steps, _double(down), _double(up))
        if not self.absence.kills:
            return Ending(float(finish), up, True)
        upload = start + self.devices.seconds(streams, steps, _double(down), _double(0))
        ends = self.absence.ends(clients, numbers, start, finish, upload, torch.tensor([up]))
        well = bool(ends.well)
        return Ending(float(ends.at), up if well else int(ends.lost), well)

    def next_change(self, count: int, now: float) -> float | None:
        """Virtual second at which one of the nodes 1 to count comes or goes; None if none ever does."""
        changes = self.absence.availability.changes(self.absence.seed, torch.arange(count), now, inf)
        then = float(changes.min())
        return None if then == inf else then


def _clients(node: int) -> Tensor:
    return torch.tensor([node - 1])


def _double(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)
