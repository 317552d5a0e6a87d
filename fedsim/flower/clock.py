"""Where a deployed fleet's seconds come from, and how long it waits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass


class Clock:
    """Seconds since some moment, and waiting; the real ones."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


WALL = Clock()


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
