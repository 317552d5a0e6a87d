"""The Ray executor: workers are actors, one for every GPU or CPU slot of this machine or of a cluster.

A call is cut into stacks and the stacks into groups as in process (fedsim.sim.executor). A group is one task: a pure
function of the jobs' ids, numbers and memory rows, of the broadcasts and of what every actor got at its start. So a
task may run twice, on any actor, and whatever dies, the bits are those of a run in which nothing did. Clients'
memory travels with the jobs and comes back with the replies; the driver's process alone keeps it. A lost actor or
node is not a lost client: the simulated federation never hears of it.

Broadcasts lie in the object store once a call, and task, data and strategy once a run; actors of one node map the
same bytes. Where replies are folded, workers can instead talk to each other (fedsim.sim.ray_plane); the bits are the
same, and when that fails the object store is there.

Letters: R jobs, C clients of a stack, W workers.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim import pages
from fedsim.engine.choose import SHARES
from fedsim.sim.collectives import Collectives, backend_for, least_groups
from fedsim.sim.executor import Executor, Jobs, Results, StackRunner, T, grouped, shown
from fedsim.sim.gather import Gather
from fedsim.sim.packing import Parcel, pack
from fedsim.sim.ray_plane import Plane
from fedsim.sim.ray_pool import RayPool, Worker, pickler
from fedsim.sim.ray_worker import Actor


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
        self.runner, self.width, self.timeout_seconds = runner, width, timeout_seconds
        self._costs = runner.task.num_examples if costs is None else costs
        self._pickler = pickler()
        pages.keep_freed_memory()
        gpus = int(runner.device.type == "cuda")
        backend = backend_for(collectives, gpus=gpus > 0)
        self._pool = RayPool(Actor, setting_of(runner), workers=workers, threads=threads, gpus=gpus, address=address)
        self._plane: Plane | None = None
        try:
            if backend is not None:
                ray = self._pool.ray
                host = ray.util.get_node_ip_address() if self._pool.others_join else "127.0.0.1"
                one, nbytes = sum(node["Alive"] for node in ray.nodes()) == 1, 4 * runner.task.layout.size
                least = least_groups(collectives, backend, one_machine=one, nbytes=nbytes)
                self._plane = Plane(self._pool, backend, host, self._pickler, timeout_seconds, least)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self._pool.workers)

    @property
    def resubmitted(self) -> int:
        """Groups that had to be computed again because a worker was lost."""
        return self._pool.resubmitted

    def run(self, jobs: Jobs) -> Results:
        """Run jobs on whichever workers are there.

        Raises:
            ClientError: a client half raised; its own exception is the cause.
            WorkersLost: one group, or every worker, was lost time and again.
        """
        groups = grouped(self.cut(jobs))
        if self._plane is not None and self._plane.takes(jobs, groups):
            if (results := self._plane.run(jobs, groups, self._costs[jobs.ids])) is not None:
                return results
        gather = Gather(len(jobs.ids), self.runner.name_of(jobs.work), len(groups))
        for group, part in zip(groups, self._results(groups, jobs), strict=True):
            gather.add(torch.cat(group), part)
            gather.end_group()
        return gather.results

    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        """See `Executor`; a few calls a worker, so that none waits long for the last.

        Raises:
            WorkersLost: one call, or every worker, was lost time and again.
        """
        return self.map_named(self.name_of_method(work), pieces, shared)

    def map_named(self, name: str, pieces: Sequence[Any], shared: dict[str, Any]) -> list[Any]:
        """`map` of a method of the task, by its name."""
        size = -(-len(pieces) // (SHARES * self.num_workers)) or 1
        parts = [pack(pieces[i : i + size], pickler=self._pickler) for i in range(0, len(pieces), size)]
        # not shared: a method of the user's may write to it
        same = self._pool.ray.put(pack(shared, pickler=self._pickler))
        done = self._in_order(
            len(parts),
            lambda worker, i: worker.actor.map.remote(self._pool.setting, name, parts[i], same),
            lambda i: f"Task.{name}",
        )
        return [value for values in done for value in values]

    def close(self) -> None:
        """Stop the workers, and the runtime if it was started here."""
        self.__dict__.pop("_plane", None)
        if (pool := self.__dict__.pop("_pool", None)) is not None:
            pool.close()

    # One call ---------------------------------------------------------------------------------------------------

    def _results(self, groups: list[list[Tensor]], jobs: Jobs) -> Iterator[Results]:
        """What the stacks of each group gave."""
        models = [self._pool.ray.put(pack(m, share=True, pickler=self._pickler)) for m in jobs.models]
        # not shared: what nobody may write to would end the worker whose client half tries
        inbox = self._pool.ray.put(pack(jobs.inbox and jobs.inbox.fields, pickler=self._pickler))
        return self._in_order(
            len(groups),
            lambda worker, i: self._ask(worker, groups[i], jobs, inbox, models),
            lambda i: f"{jobs.work} in round {jobs.round + 1} for client(s) {shown(jobs.ids[torch.cat(groups[i])])}",
        )

    def _in_order(self, count: int, ask: Callable[[Worker, int], Any], what: Callable[[int], str]) -> Iterator[Any]:
        return self._pool.in_order(
            count, ask, lambda _: self.timeout_seconds, what, "lower runtime.stack or runtime.workers"
        )

    def _ask(self, worker: Worker, group: list[Tensor], jobs: Jobs, inbox: Any, models: list[Any]) -> Any:
        """Let a worker run the stacks of a group; the reference to its answer."""
        part = jobs.rows(torch.cat(group))
        if part.inbox is not None:
            part.inbox.fields = {}
        needed = torch.unique(jobs.which[torch.cat(group)]).tolist()  # in the order that `rows` numbers them
        parcel = pack((replace(part, models=[]), [len(stack) for stack in group]), pickler=self._pickler)
        return worker.actor.run.remote(self._pool.setting, parcel, inbox, *[models[m] for m in needed])


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
