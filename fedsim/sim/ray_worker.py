"""What runs in a Ray worker's process: the stacks of one group.

Letters: R jobs of a group, C clients of a stack.
"""

from __future__ import annotations

import torch

from fedsim import pages
from fedsim.sim.executor import Gather, StackRunner, collect
from fedsim.sim.failure import Failure
from fedsim.sim.packing import Parcel, pack, unpack


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
            stacks = list(torch.arange(len(jobs.ids)).split(sizes))
            collect(gather, [stacks], (runner.run(jobs.rows(index)) for index in stacks))
        except Exception as error:
            return pack(Failure.of(error))
        return pack(gather.results)

    def _open(self, setting: Parcel) -> StackRunner:
        if self._runner is None:
            self._runner = StackRunner(*unpack(setting))
        return self._runner
