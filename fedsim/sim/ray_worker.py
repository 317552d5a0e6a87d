"""What runs in a Ray worker's process: the stacks of one group, and exceptions that travel as values.

Letters: R jobs of a group, C clients of a stack.
"""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from fedsim import pages
from fedsim.sim.executor import ClientError, Gather, StackRunner
from fedsim.sim.packing import Parcel, pack, unpack


@dataclass
class Failure:
    """An exception that a worker sends as a value, so that Ray neither wraps nor retries it."""

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
    """The exception itself if it survives pickling, else what it said."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


class Actor:
    """What runs in a worker's process. All that it keeps comes anew with every call, so restarts lose nothing."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        pages.keep_freed_memory()
        self._runner: StackRunner | None = None

    def ready(self, setting: Parcel) -> Parcel:
        """Open the task and the strategy, which imports the user's modules."""
        try:
            self._open(setting)
        except ImportError as error:
            return pack(Failure.of(RuntimeError(f"a Ray worker cannot import what the run needs: {error}")))
        return pack(None)

    def run(self, setting: Parcel, parcel: Parcel, inbox: Parcel, *models: Parcel) -> Parcel:
        """Run the stacks of one group in their order and fold their sums in that order."""
        jobs, sizes = unpack(parcel)
        jobs.models = [unpack(model) for model in models]
        if jobs.inbox is not None:
            jobs.inbox.fields = unpack(inbox)
        try:
            runner = self._open(setting)
            gather = Gather(len(jobs.ids), runner.name_of(jobs.work), num_groups=1)
            for index in torch.arange(len(jobs.ids)).split(sizes):
                gather.add(index, runner.run(jobs.rows(index)))
        except Exception as error:
            return pack(Failure.of(error))
        gather.end_group()
        return pack(gather.results)

    def _open(self, setting: Parcel) -> StackRunner:
        if self._runner is None:
            self._runner = StackRunner(*unpack(setting))
        return self._runner
