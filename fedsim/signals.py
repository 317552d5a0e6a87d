"""Signals that ask a run to stop: Ctrl-C, and SIGTERM of a cluster."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(asked: list[int]) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM are noted in `asked`, to stop after this round. A second Ctrl-C stops at once.

    Several may overlap in any order, as those of runs that are stepped through in turns do.
    """
    over = False

    def handle(number: int, frame: FrameType | None) -> None:
        if over:  # and put back by one that began later
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        over = True
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
