"""How much a fuzzer tries: a little with the other tests, and as much as `make fuzz` asks for (FUZZ=1)."""

from __future__ import annotations

import os


def cases(short: int, long: int) -> int:
    """How many cases this run tries."""
    return long if os.environ.get("FUZZ") else short
