"""The Ray executor: workers are actors, one for every GPU or CPU slot of this machine or of a cluster.

A call is cut into stacks and the stacks into groups as in process (fedsim.sim.executor). A group is one task: a pure
function of the jobs' ids, numbers and memory rows, of the broadcasts and of what every actor got at its start. So a
task may run twice, on any actor, and whatever dies, the bits are those of a run in which nothing did. Clients'
memory travels with the jobs and comes back with the replies; the run's process alone keeps it. A lost actor or
node is not a lost client: the simulated federation never hears of it.

What travels is packed and opened here and on the workers; what drives Ray (fedsim.sim.ray_driver) only hands it on.
Broadcasts lie in the object store once a call, and task, data and strategy once a run; actors of one node map the
same bytes. Where replies are folded, workers can instead talk to each other (fedsim.sim.ray_plane); the bits are the
same, and when that fails the object store is there.

Letters: R jobs, C clients of a stack, W workers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fedsim import pages
from fedsim.engine.choose import SHARES
from fedsim.sim.collectives import Collectives, backend_for
from fedsim.sim.executor import Executor, Jobs, Results, StackRunner, T, grouped, shown
from fedsim.sim.gather import Gather
from fedsim.sim.packing import Parcel, pack, unpack
from fedsim.sim.ray_driver import Driver
from fedsim.sim.ray_pool import pickler
from fedsim.sim.shares import broadcasts, share_out, together


class RayExecutor(Executor):
    """Workers are Ray actors, driven by this process.

    Args:
        runner: runs one stack; its task, strategy, seed, device and uplink are sent to every worker once.
        width: clients of a stack.
        workers: how many actors; None for one per GPU of the cluster if the runner's device is one, else one per
            `threads` CPUs.
        threads: intra-op threads of each worker.
        address: "auto" or "host:port" of a running cluster; None starts a runtime on this machine. A runtime that
            this process is already connected to is used, whatever the address.
        collectives: how the model and sums travel where replies are folded: between workers by `gloo` or `nccl`, or
            through the `object_store`; `auto` is a rule (see `fedsim.sim.collectives.backend_for`).
        costs: [N] what a client's job costs, to divide calls by; its samples if left out.
        timeout_seconds: for one group of stacks; a worker that takes longer counts as hung and is replaced.

    Raises:
        ValueError: if task or strategy cannot be sent, there is no cluster at the address, no room for a worker, or no
            GPU for NCCL.
    """

    def __init__(
        self,
        runner: StackRunner,
        *,
        width: int,
        workers: int | None = None,
        threads: int = 1,
        address: str | None = None,
        collectives: Collectives = "auto",
        costs: Tensor | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        self.runner, self.width = runner, width
        self._costs = runner.task.num_examples if costs is None else costs
        self._pickler = pickler()
        pages.keep_freed_memory()
        gpus = int(runner.device.type == "cuda")
        self._options: dict[str, Any] = {
            "workers": workers,
            "threads": threads,
            "gpus": gpus,
            "address": address,
            "collectives": collectives,
            "backend": backend_for(collectives, gpus=gpus > 0),
            "nbytes": 4 * runner.task.layout.size,
            "timeout_seconds": timeout_seconds,
        }
        self._driver: Any = self._start()

    def _start(self) -> Any:
        """What drives Ray: a `Driver`, or what is asked as one."""
        return Driver(setting_of(self.runner), **self._options)

    @property
    def num_workers(self) -> int:
        """W."""
        found: int = self._driver.num_workers
        return found

    def run(self, jobs: Jobs) -> Results:
        """Run jobs on whichever workers are there.

        Raises:
            ClientError: a client half raised; its own exception is the cause.
            WorkersLost: one group, or every worker, was lost time and again.
        """
        groups = grouped(self.cut(jobs))
        if jobs.weights is not None and len(groups) >= self._driver.least_groups:
            if (results := self._together(groups, jobs)) is not None:
                return results
        gather = Gather(len(jobs.ids), self.runner.name_of(jobs.work), len(groups))
        for group, part in zip(groups, self._apart(groups, jobs), strict=True):
            gather.add(torch.cat(group), part)
            gather.end_group()
        return gather.results

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        """See `Executor`; a few calls a worker, so that none waits long for the last.

        Raises:
            WorkersLost: one call, or every worker, was lost time and again.
        """
        name = self.name_of_method(work)
        size = -(-len(pieces) // (SHARES * self.num_workers)) or 1
        parts = [pieces[i : i + size] for i in range(0, len(pieces), size)]
        parcels = (pack(part, pickler=self._pickler) for part in [shared, *((name, part) for part in parts)])
        found = self._driver.in_order("map", [[0]] * len(parts), [f"Task.{name}"] * len(parts), parcels)
        return [value for parcel in found for value in unpack(parcel)]

    def close(self) -> None:
        """Stop the workers, and the runtime if it was started here."""
        if (driver := self.__dict__.get("_driver")) is not None:
            self._driver = None
            driver.close()

    # One call ---------------------------------------------------------------------------------------------------

    def _together(self, groups: list[list[Tensor]], jobs: Jobs) -> Results | None:
        """What workers fold between them; None if they cannot, and then nothing has happened."""
        if (size := self._driver.members()) < 2:
            return None
        whole = share_out(jobs, groups, self._costs[jobs.ids], size)
        parcels = (self._shared(part) for part in [broadcasts(jobs), *(share for _, share in whole)])
        outcomes = [unpack(parcel) for parcel in self._driver.run_shares(parcels)]
        return together(len(jobs.ids), [index for index, _ in whole], outcomes) if outcomes else None

    def _apart(self, groups: list[list[Tensor]], jobs: Jobs) -> Iterator[Results]:
        """What the stacks of each group gave."""
        # not shared: what nobody may write to would end the worker whose client half tries
        inbox = pack(jobs.inbox and jobs.inbox.fields, pickler=self._pickler)
        # of the models each group gets its own, in the order that `rows` numbers them
        used = [[0, *(1 + torch.unique(jobs.which[torch.cat(group)])).tolist()] for group in groups]
        work = f"{jobs.work} in round {jobs.round + 1} for client(s)"
        what = [f"{work} {shown(jobs.ids[torch.cat(group)])}" for group in groups]
        models = (self._shared(model) for model in jobs.models)
        parts = (self._shared(_part(group, jobs)) for group in groups)
        found = self._driver.in_order("run", used, what, chain([inbox], models, parts))
        return (unpack(parcel) for parcel in found)

    def _shared(self, value: Any) -> Parcel:
        return pack(value, share=True, pickler=self._pickler)


def _part(group: list[Tensor], jobs: Jobs) -> tuple[Jobs, list[int]]:
    """The jobs of a group, without what is broadcast, and how many each of its stacks has."""
    part = jobs.rows(torch.cat(group))
    inbox = part.inbox and replace(part.inbox, fields={})
    return replace(part, models=[], inbox=inbox), [len(stack) for stack in group]


def setting_of(runner: StackRunner) -> Parcel:
    """What every worker gets once, of which it makes its own runner.

    Raises:
        ValueError: if task or strategy cannot be sent.
    """
    parts = (runner.task, runner.strategy, runner.seed, runner.device, runner.uplink)
    try:
        return pack(parts, share=True, pickler=pickler())
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the task or the strategy cannot be sent to Ray workers: {error}; keep open files "
            "and generators out of them, or use runtime.executor=in_process"
        ) from error
