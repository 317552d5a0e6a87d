"""What users hang onto a run, callbacks and sinks of their own, and naming what these raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedsim.config import place


class ObserverError(RuntimeError):
    """A callback or a sink of the user's raised; the message names it and its place, the cause is its own exception."""


@contextmanager
def observing(what: str, observer: object, when: str) -> Iterator[None]:
    """Name what a callback or a sink of the user's raises, and where; what ours raise comes through as it is."""
    try:
        yield
    except Exception as e:
        if (where := place(e, observer)) is None:
            raise
        raise ObserverError(f"{what} failed {when}: {type(e).__name__}: {e} ({where})") from e
