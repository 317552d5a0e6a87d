"""Virtual time: a queue of jobs ordered by when they finish; ties go to the job that was sent first.

What several jobs were sent is kept once: a strategy that replaces its clients one by one sends each of them the same
model until it steps, and jobs that start from one model share the copies and products that this allows.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsim.sim.executor import Computed


@dataclass(order=True)
class Event:
    """One job in flight.

    Args:
        finish: seconds at which its reply reaches the server, or at which it dies.
        sequence: number of the job in the order of sending; breaks ties.
        client: its client's id.
        number: job index: how many jobs that client had before.
        sent: which call of `send` it belongs to.
        started: seconds at which it was sent.
        lost: bits of its reply that have been sent when it dies; -1 if it ends with its reply.
        result: what the job gave, once computed; None until then.
    """

    finish: float
    sequence: int
    client: int = field(compare=False)
    number: int = field(compare=False)
    sent: int = field(compare=False)
    started: float = field(compare=False)
    lost: int = field(default=-1, compare=False)
    result: Computed | None = field(default=None, compare=False)


class EventQueue:
    """A heap of events.

    >>> q = EventQueue()
    >>> q.push([Event(2.0, 0, 7, 0, 0, 0.0), Event(1.0, 1, 8, 0, 0, 0.0), Event(1.0, 2, 9, 0, 0, 0.0)])
    >>> [e.client for e in q.pop(until=1.5)]
    [8, 9]
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._heap = list(events)
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Event]:
        """Events in order of arrival."""
        return iter(sorted(self._heap))

    def push(self, events: Iterable[Event]) -> None:
        for event in events:
            heapq.heappush(self._heap, event)

    def pop(self, until: float, count: int | None = None) -> list[Event]:
        """Events that finish by `until` (seconds), with at most `count` replies, in order of arrival."""
        out: list[Event] = []
        while self._heap and self._heap[0].finish <= until and (count is None or count > 0):
            out.append(heapq.heappop(self._heap))
            if count is not None and out[-1].lost < 0:
                count -= 1
        return out

    def take(self, which: Callable[[Event], bool]) -> list[Event]:
        """Some events, in order of arrival, whenever they finish."""
        out = sorted(filter(which, self._heap))
        if out:
            self._heap = [e for e in self._heap if not which(e)]
            heapq.heapify(self._heap)
        return out


@dataclass
class Sent:
    """What clients were sent: the work's name, the broadcast, the server step, and how many have not replied yet."""

    work: str
    broadcast: Mapping[str, Any]
    round: int
    open: int = 0

    def same_as(self, other: Sent) -> bool:
        """Whether the two say the same, to the last bit."""
        if (self.work, self.round, self.broadcast.keys()) != (other.work, other.round, other.broadcast.keys()):
            return False
        return all(_same(value, other.broadcast[name]) for name, value in self.broadcast.items())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
