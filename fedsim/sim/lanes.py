"""Work side by side on one GPU: the thread of each worker enqueues on a CUDA stream of its own.

A stream runs in its order, and between streams nothing holds but what an event says. So a worker's stream waits for
what the caller had enqueued when it gave the work, and the caller's stream for what the worker enqueued, before anybody
touches the result. Memory goes back to the stream that it was taken on, as if only that one used it: arguments are held
until the caller's stream waits for the worker's, and results are announced to the caller's stream (`record_stream`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Lanes:
    """Streams of the workers.

    Args:
        device: a GPU that several workers share; None where there is nothing to order.
    """

    device: torch.device | None

    def open(self, threads: int) -> None:
        """Begin a worker's thread, with so many intra-op threads."""
        torch.set_num_threads(threads)
        if self.device is not None:
            torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def give(self, call: Callable[[], T], pool: Executor) -> Errand[T]:
        """Let a worker do something."""
        return Errand(self, call, pool.submit(self._do, call, self._point()))

    def _do(self, call: Callable[[], T], given: torch.cuda.Event | None) -> tuple[T, torch.cuda.Event | None]:
        self.wait(given)
        return call(), self._point()

    def _point(self) -> torch.cuda.Event | None:
        """An event after all that this thread has enqueued."""
        return None if self.device is None else torch.cuda.current_stream(self.device).record_event()

    def wait(self, point: torch.cuda.Event | None) -> None:
        """Let what this thread enqueues from now on wait for an event."""
        if point is not None:
            torch.cuda.current_stream(self.device).wait_event(point)


@dataclass(frozen=True)
class Errand(Generic[T]):
    """What a worker was given to do, with all that it needs."""

    lanes: Lanes
    call: Callable[[], T]
    future: Future[tuple[T, torch.cuda.Event | None]]

    def result(self) -> T:
        """What it gave, for this thread to use."""
        value, done = self.future.result()
        self.lanes.wait(done)
        if done is not None:
            _announce(value, torch.cuda.current_stream(self.lanes.device))
        return value


def _announce(value: Any, stream: torch.cuda.Stream) -> None:
    """Say of all tensors of a result that a stream uses them."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            value.record_stream(stream)
    elif isinstance(value, Mapping):
        _announce(list(value.values()), stream)
    elif isinstance(value, list | tuple):
        for part in value:
            _announce(part, stream)
    elif is_dataclass(value):
        _announce(vars(value), stream)
