"""What runs in a Ray worker's process: the stacks of one group of stacks, or a share of a call beside other workers."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from fedsim import pages
from fedsim.engine.precision import same_bits_again
from fedsim.sim.collectives import Backend, Group, meet
from fedsim.sim.executor import Lost, StackRunner
from fedsim.sim.failure import Failure
from fedsim.sim.gather import Gather, collect
from fedsim.sim.packing import Parcel, pack, unpack
from fedsim.sim.shares import InOrder, run_share

JOIN_SECONDS = 30.0  # for all workers of a new group to find each other


class Actor:
    """What runs in a worker's process. All that it keeps comes anew with every call, so restarts lose nothing."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        pages.keep_freed_memory()
        self._runner: StackRunner | None = None
        self._group: Group | None = None
        self._epoch = 0

    def ready(self, setting: Parcel) -> Failure | None:
        """Open the task and the strategy, which imports the user's modules."""
        try:
            self._open(setting)
        except ImportError as error:
            return Failure.of(RuntimeError(f"a Ray worker cannot import what the run needs: {error}"))
        except torch.OutOfMemoryError as error:
            return Failure.of(error)
        return None

    def run(self, setting: Parcel, parcel: Parcel, inbox: Parcel, *models: Parcel) -> Parcel | Failure:
        """Run the stacks of one group in their order and fold their sums in that order."""
        try:
            jobs, sizes = unpack(parcel)
            jobs.models = [unpack(model) for model in models]
            if jobs.inbox is not None:
                jobs.inbox.fields = unpack(inbox)
            runner = self._open(setting)
            gather = Gather(len(jobs.ids), runner.name_of(jobs.work), num_groups=1)
            stacks = list(torch.arange(len(jobs.ids)).split(sizes))
            collect(gather, [stacks], _one_by_one(runner)(stacks, jobs))
        except Exception as error:
            return Failure.of(error)
        return pack(gather.results)

    def map(self, setting: Parcel, parcel: Parcel, shared: Parcel) -> Parcel | Failure:
        """Some pieces of the task's own work, one after the other."""
        try:
            (work, pieces), same = unpack(parcel), unpack(shared)
            method = getattr(self._open(setting).task, work)
            return pack([method(piece, **same) for piece in pieces])
        except Exception as error:
            return Failure.of(error)

    def join(
        self, epoch: int, host: str, port: int, rank: int, size: int, backend: Backend, seconds: float
    ) -> Lost | None:
        """Enter a new group of workers, whose store is at host:port; what went wrong, if anything did."""
        self._leave()
        try:
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS))
            mine = dist.PrefixStore(f"epoch/{epoch}", store)
            meet(mine, rank, size, JOIN_SECONDS)
            self._group = Group(mine, rank, size, host=host, backend=backend, timeout_seconds=seconds)
        except (Lost, dist.DistError) as error:
            return Lost(str(error))
        self._epoch = epoch
        return None

    def run_share(self, setting: Parcel, epoch: int, parcel: Parcel, sent: Parcel | None) -> Parcel | Lost:
        """Run a share with the others of the group; what is broadcast is given to the first of them."""
        if self._group is None or self._epoch != epoch:
            return Lost("the worker was started anew")
        try:
            runner = self._open(setting)
            own = [] if sent is None else unpack(sent)
            return pack(run_share(unpack(parcel), own, runner, _one_by_one(runner), self._group))
        except Lost as error:
            self._leave()
            return error

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group, self._epoch = None, 0

    def _open(self, setting: Parcel) -> StackRunner:
        if self._runner is None:
            self._runner = StackRunner(*unpack(setting))
            same_bits_again(self._runner.device)
        return self._runner


def _one_by_one(runner: StackRunner) -> InOrder:
    return lambda stacks, jobs: (runner.run(jobs.rows(index)) for index in stacks)
