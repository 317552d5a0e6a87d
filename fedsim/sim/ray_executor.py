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

import logging
import pickle
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.config import first_line
from fedsim.sim.collectives import Collectives, backend_for
from fedsim.sim.executor import Executor, Gather, Jobs, Results, StackRunner, grouped, shown
from fedsim.sim.failure import Failure
from fedsim.sim.packing import Parcel, pack
from fedsim.sim.ray_plane import Plane
from fedsim.sim.ray_pool import ATTEMPTS, RayPool, Worker
from fedsim.sim.ray_runtime import connect

_log = logging.getLogger("fedsim")


@dataclass(frozen=True)
class Setting:
    """What every worker gets once, and what has to be known of it without opening it.

    Args:
        parcel: task, strategy, seed, device and uplink.
        strategy: its class, for messages.
        device: where workers compute: "cpu" or "cuda".
        num_examples: [N] samples of each client.
    """

    parcel: Parcel
    strategy: str
    device: str
    num_examples: Tensor

    @classmethod
    def of(cls, runner: StackRunner) -> Setting:
        """That of a runner of stacks.

        Raises:
            ValueError: if task or strategy cannot be sent.
        """
        parts = (runner.task, runner.strategy, runner.seed, runner.device, runner.uplink)
        try:
            parcel = pack(parts, share=True, pickler=pickler())
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the task or the strategy cannot be sent to Ray workers: {error}; keep open files "
                "and generators out of them, or use runtime.executor=in_process"
            ) from error
        return cls(parcel, type(runner.strategy).__name__, runner.device.type, runner.task.num_examples)


def pickler() -> Any:
    """The class of pickler that takes the user's own classes, wherever they are written."""
    import ray.cloudpickle

    return ray.cloudpickle.Pickler


class RayExecutor(Executor):
    """Workers are Ray actors, driven by this process.

    Args:
        setting: of the workers.
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
        ValueError: if there is no cluster at the address, no room for a worker, or no GPU for NCCL.
    """

    def __init__(
        self,
        setting: Setting,
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
        import ray

        self.num_examples, self.width, self.timeout_seconds = setting.num_examples, width, timeout_seconds
        self.resubmitted = 0  # groups that had to be computed again because a worker was lost
        self._strategy = setting.strategy
        self._costs = self.num_examples if costs is None else costs
        self._ray, self._pickler = ray, pickler()
        self._runs = 0
        gpus = int(setting.device == "cuda")
        backend = backend_for(collectives, gpus=gpus > 0)
        self._started = connect(ray, address, workers, threads, gpus, sum(a.nbytes for a in setting.parcel[1]))
        try:
            self._setting = ray.put(setting.parcel)
            joined = address is not None
            self._pool = RayPool(ray, self._setting, workers=workers, threads=threads, gpus=gpus, wait=joined)
            self._plane: Plane | None = None
            if backend is not None:
                nobody_joins = self._started and not joined
                host = "127.0.0.1" if nobody_joins else ray.util.get_node_ip_address()
                self._plane = Plane(self._pool, backend, host, self._pickler, timeout_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self._pool.workers)

    def run(self, jobs: Jobs) -> Results:
        """Run jobs on whichever workers are there.

        Raises:
            ClientError: a client half raised; its own exception is the cause.
            RuntimeError: one group, or every worker, was lost `ATTEMPTS` times in a row.
        """
        groups = grouped(self.cut(jobs))
        if self._plane is not None and not self._plane.given_up and jobs.weights is not None and len(groups) > 1:
            self._runs += 1
            if (results := self._plane.run(jobs, groups, self._costs[jobs.ids], self._runs)) is not None:
                return results
        gather = Gather(len(jobs.ids), f"{self._strategy}.{jobs.work}", len(groups))
        for group, part in zip(groups, self._in_order(groups, jobs), strict=True):
            gather.add(torch.cat(group), part)
            gather.end_group()
        return gather.results

    def close(self) -> None:
        """Stop the workers, and the runtime if it was started here."""
        self.__dict__.pop("_plane", None)
        if (pool := self.__dict__.pop("_pool", None)) is not None:
            pool.close()
        self.__dict__.pop("_setting", None)
        if self._started:
            self._started = False
            self._ray.shutdown()

    # One call ---------------------------------------------------------------------------------------------------

    def _in_order(self, groups: list[list[Tensor]], jobs: Jobs) -> Iterator[Results]:
        """Results in the order of the groups, each computed by whichever worker was free."""
        self._runs += 1
        models = [self._ray.put(pack(m, share=True, pickler=self._pickler)) for m in jobs.models]
        # not shared: what nobody may write to would end the worker whose client half tries
        inbox = self._ray.put(pack(jobs.inbox and jobs.inbox.fields, pickler=self._pickler))
        todo, lost = deque(range(len(groups))), [0] * len(groups)
        done: dict[int, Results] = {}
        for following in range(len(groups)):
            while following not in done:
                for worker in self._pool.workers:
                    if worker.ref is None and todo:
                        self._submit(worker, todo.popleft(), groups, jobs, inbox, models)
                tag, outcome = self._pool.next_outcome()
                if tag is None or tag[0] != self._runs:
                    continue  # a worker got ready, or finished what a call that failed had left behind
                index = tag[1]
                if isinstance(outcome, Failure):
                    raise outcome.error from outcome.cause
                if isinstance(outcome, Results):
                    done[index] = outcome
                    continue
                lost[index] += 1
                self.resubmitted += 1
                if lost[index] == ATTEMPTS:
                    raise RuntimeError(_gave_up(jobs, torch.cat(groups[index]), outcome)) from outcome
                _log.warning(
                    "round %d: a worker was lost (%s); its stacks run again", jobs.round + 1, first_line(outcome)
                )
                todo.appendleft(index)
            yield done.pop(following)

    def _submit(
        self, worker: Worker, index: int, groups: list[list[Tensor]], jobs: Jobs, inbox: Any, models: list[Any]
    ) -> None:
        group = groups[index]
        part = jobs.rows(torch.cat(group))
        if part.inbox is not None:
            part.inbox.fields = {}
        needed = torch.unique(jobs.which[torch.cat(group)]).tolist()  # in the order that `rows` numbers them
        parcel = pack((replace(part, models=[]), [len(stack) for stack in group]), pickler=self._pickler)
        ref = worker.actor.run.remote(self._setting, parcel, inbox, *[models[m] for m in needed])
        self._pool.call(worker, ref, (self._runs, index), self.timeout_seconds)


def _gave_up(jobs: Jobs, index: Tensor, error: BaseException) -> str:
    return (
        f"{jobs.work} in round {jobs.round + 1} for client(s) {shown(jobs.ids[index])} lost its worker {ATTEMPTS} "
        f"times in a row; the last time: {first_line(error)}. If the node ran out of memory, lower "
        "runtime.stack or runtime.workers"
    )
