"""Where a deployed fleet's seconds come from, and how long it waits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Protocol


class Clock(Protocol):
    """Seconds, and waiting."""

    def now(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep(self, seconds: float) -> None:
        """Wait."""
        ...


class WallClock:
    """The real one."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass
class VirtualClock:
    """Time that passes only in `sleep`, for grids that run in one process."""

    seconds: float = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


WALL = WallClock()


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait.

    Args:
        reply_seconds: for a reply, or for all nodes to connect, before the run fails.
        poll_seconds: between two looks for replies.
    """

    reply_seconds: float = 3600.0
    poll_seconds: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive seconds, got {value}")
