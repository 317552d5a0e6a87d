"""Exceptions that travel as values from the process in which a client half ran."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

from fedsim.sim.executor import ClientError


@dataclass
class Failure:
    """An exception as a worker sends it: what it was, and its cause if that can be sent.

    Args:
        error: to be raised where it arrives.
        cause: what it was raised from.
    """

    error: Exception
    cause: BaseException | None

    @classmethod
    def of(cls, error: Exception) -> Failure:
        told = error if isinstance(error, ClientError) else _sendable(error)
        cause = None if error.__cause__ is None else _sendable(error.__cause__)
        where = "".join(traceback.format_exception(error.__cause__ or error))
        (cause or told).add_note(f"On the worker:\n{where}")  # frames do not travel, so here they are as text
        return cls(told, cause)


def _sendable(error: BaseException) -> Any:
    """The exception itself if it survives pickling (what is opened here was made here), else what it said."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
