"""The Ray executor: workers are actors, one for every GPU or CPU slot of this machine or of a cluster.

A call is cut into stacks and the stacks into groups as in process (fedsim.sim.executor). A group is one task: a pure
function of the jobs' ids, numbers and memory rows, of the broadcasts and of what every actor got at its start. So a
task may run twice, on any actor, and whatever dies, the bits are those of a run in which nothing did. Clients'
memory travels with the jobs and comes back with the replies; the driver's process alone keeps it. A lost actor or
node is not a lost client: the simulated federation never hears of it.

Broadcasts lie in the object store once a call, and task, data and strategy once a run; actors of one node map the
same bytes.

Letters: R jobs, C clients of a stack, W workers.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.sim.executor import Gather, Jobs, Results, StackRunner, cut, grouped
from fedsim.sim.failure import Failure
from fedsim.sim.packing import Parcel, pack, unpack
from fedsim.sim.ray_runtime import connect, environment
from fedsim.sim.ray_worker import Actor

ATTEMPTS = 4  # how often one group, or one worker's start, is tried before the run gives up
JOIN_SECONDS = 60.0  # for the first node with room to join a cluster that has none yet
START_SECONDS = 300.0  # for a worker to be placed, to import torch and to fetch the task

_log = logging.getLogger("fedsim")


@dataclass(eq=False)
class _Worker:
    """An actor and the one call that it is busy with.

    Args:
        actor: its handle.
        ref: the outstanding call, or None when the worker is free.
        group: (number of the `run`, index of the group) of that call; None while the worker gets ready.
        deadline: monotonic seconds at which the call counts as hung.
        failures: starts in a row that came to nothing.
    """

    actor: Any
    ref: Any = None
    group: tuple[int, int] | None = None
    deadline: float = 0.0
    failures: int = 0


class RayExecutor:
    """Workers are Ray actors.

    Args:
        runner: runs one stack; its task, strategy, seed, device and uplink are sent to every worker once.
        width: clients of a stack.
        workers: how many actors; None for one per GPU of the cluster if the runner's device is one, else one per
            `threads` CPUs.
        threads: intra-op threads of each worker.
        address: "auto" or "host:port" of a running cluster; None starts a runtime on this machine. A runtime that
            this process is already connected to is used, whatever the address.
        timeout_seconds: for one group of stacks; a worker that takes longer counts as hung and is replaced.

    Raises:
        ValueError: if task or strategy cannot be sent, there is no cluster at the address, or no room for a worker.
    """

    def __init__(
        self,
        runner: StackRunner,
        *,
        width: int,
        workers: int | None = None,
        threads: int = 1,
        address: str | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
        import ray
        import ray.cloudpickle

        self.runner, self.width, self.timeout_seconds = runner, width, timeout_seconds
        self.resubmitted = 0  # groups that had to be computed again because a worker was lost
        self._ray, self._pickler = ray, ray.cloudpickle.Pickler
        self._threads, self._gpus = threads, 1 if runner.device.type == "cuda" else 0
        self._runs = 0
        setting = self._pack_setting(runner)
        self._started = connect(ray, address, workers, threads, self._gpus, sum(a.nbytes for a in setting[1]))
        try:
            self._setting = ray.put(setting)
            self._workers = [self._start() for _ in range(self._count(workers, joining=address is not None))]
        except BaseException:
            self.close()
            raise

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self._workers)

    def run(self, jobs: Jobs) -> Results:
        """Run jobs on whichever workers are there.

        Raises:
            ClientError: a client half raised; its own exception is the cause.
            RuntimeError: one group, or every worker, was lost `ATTEMPTS` times in a row.
        """
        groups = grouped(cut(self.runner.task.num_examples[jobs.ids], self.width))
        gather = Gather(len(jobs.ids), self.runner.name_of(jobs.work), len(groups))
        for group, part in zip(groups, self._in_order(groups, jobs), strict=True):
            gather.add(torch.cat(group), part)
            gather.end_group()
        return gather.results

    def serve(self) -> bool:
        return False

    def close(self) -> None:
        """Stop the workers, and the runtime if it was started here."""
        for worker in self.__dict__.pop("_workers", []):
            self._ray.kill(worker.actor)
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
                for worker in self._workers:
                    if worker.ref is None and todo:
                        self._submit(worker, todo.popleft(), groups, jobs, inbox, models)
                group, outcome = self._next_outcome()
                if group is None or group[0] != self._runs:
                    continue  # a worker got ready, or finished what a call that failed had left behind
                index = group[1]
                if isinstance(outcome, Failure):
                    raise outcome.error from outcome.cause
                if isinstance(outcome, Results):
                    done[index] = outcome
                    continue
                lost[index] += 1
                self.resubmitted += 1
                if lost[index] == ATTEMPTS:
                    raise RuntimeError(_gave_up(jobs, torch.cat(groups[index]), outcome)) from outcome
                _log.warning("round %d: a worker was lost (%s); its stacks run again", jobs.round + 1, _line(outcome))
                todo.appendleft(index)
            yield done.pop(following)

    def _submit(
        self, worker: _Worker, index: int, groups: list[list[Tensor]], jobs: Jobs, inbox: Any, models: list[Any]
    ) -> None:
        group = groups[index]
        part = jobs.rows(torch.cat(group))
        if part.inbox is not None:
            part.inbox.fields = {}
        needed = torch.unique(jobs.which[torch.cat(group)]).tolist()  # in the order that `rows` numbers them
        parcel = pack((replace(part, models=[]), [len(stack) for stack in group]), pickler=self._pickler)
        worker.ref = worker.actor.run.remote(self._setting, parcel, inbox, *[models[m] for m in needed])
        worker.group, worker.deadline = (self._runs, index), time.monotonic() + self.timeout_seconds

    def _next_outcome(self) -> tuple[tuple[int, int] | None, Any]:
        """Wait for one worker: (which group or None, its results, a Failure, or how the worker was lost)."""
        busy = {w.ref: w for w in self._workers if w.ref is not None}
        first = min(busy.values(), key=lambda w: w.deadline)
        ready, _ = self._ray.wait(list(busy), num_returns=1, timeout=max(0.0, first.deadline - time.monotonic()))
        worker = busy[ready[0]] if ready else first
        group, ref = worker.group, worker.ref
        worker.ref = worker.group = None
        try:
            if not ready:
                raise TimeoutError(f"no answer within {self.timeout_seconds if group else START_SECONDS:g} s")
            outcome = self._fetch(ref)
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            self._recover(worker, error, getting_ready=group is None, hung=isinstance(error, TimeoutError))
            return group, error
        worker.failures = 0
        if group is None and outcome is not None:
            raise outcome.error from outcome.cause
        return group, outcome

    def _fetch(self, ref: Any) -> Any:
        """What a finished call returned; the bytes may still have to come from another node."""
        try:
            return unpack(self._ray.get(ref, timeout=self.timeout_seconds))
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, self._ray.exceptions.RayError):
                raise cause from None  # an argument was lost with its node, say
            raise RuntimeError(f"a Ray worker failed outside of any client's work: {error}") from None

    # Workers ----------------------------------------------------------------------------------------------------

    def _pack_setting(self, runner: StackRunner) -> Parcel:
        parts = (runner.task, runner.strategy, runner.seed, runner.device, runner.uplink)
        try:
            return pack(parts, share=True, pickler=self._pickler)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the task or the strategy cannot be sent to Ray workers: {error}; keep open files "
                "and generators out of them, or use runtime.executor=in_process"
            ) from error

    def _room(self, resources: Mapping[str, float]) -> int:
        if self._gpus:
            return int(resources.get("GPU", 0))
        return int(resources.get("CPU", 0)) // self._threads

    def _count(self, workers: int | None, *, joining: bool) -> int:
        until = time.monotonic() + JOIN_SECONDS * joining
        while (room := self._room(have := self._ray.cluster_resources())) < 1 and time.monotonic() < until:
            time.sleep(0.5)
        if room < 1:
            raise ValueError(
                f"the Ray cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs, but a worker needs "
                f"{self._threads} CPU(s){' and a GPU' if self._gpus else ''}; add nodes, or lower runtime.threads"
            )
        if workers is not None and workers > room:
            _log.warning("%d Ray workers were asked for, but there is room for %d; the rest wait", workers, room)
        return room if workers is None else workers

    def _start(self) -> _Worker:
        worker = _Worker(self._create())
        self._get_ready(worker)
        return worker

    def _create(self) -> Any:
        remote = self._ray.remote(
            num_cpus=self._threads,
            num_gpus=self._gpus,
            max_restarts=-1,
            max_task_retries=0,  # groups are sent again from here, to whoever is free
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment(self._threads)},
        )
        return remote(Actor).remote(self._threads)

    def _get_ready(self, worker: _Worker) -> None:
        worker.ref = worker.actor.ready.options(max_task_retries=-1).remote(self._setting)
        worker.group, worker.deadline = None, time.monotonic() + START_SECONDS

    def _recover(self, worker: _Worker, error: BaseException, *, getting_ready: bool, hung: bool) -> None:
        """Bring a worker back: its actor restarts by itself unless it hangs or did not even start."""
        if getting_ready:
            worker.failures += 1
            free = {k: v for k, v in self._ray.available_resources().items() if k in ("CPU", "GPU")}
            _log.warning("a Ray worker did not start: %s; free in the cluster: %s", _line(error), free or "nothing")
            if all(w.failures >= ATTEMPTS for w in self._workers):
                raise RuntimeError(
                    f"no Ray worker could be started in {ATTEMPTS} attempts each; the last one: {error}; see that "
                    "fedsim and your own modules can be imported on every node, and that the cluster has free CPUs or "
                    f"GPUs (now: {free or 'none'})"
                ) from error
            self._ray.kill(worker.actor)
            worker.actor = self._create()
        elif hung:
            self._ray.kill(worker.actor, no_restart=False)
        self._get_ready(worker)


def _gave_up(jobs: Jobs, index: Tensor, error: BaseException) -> str:
    ids = jobs.ids[index]
    shown = ", ".join(str(i) for i in ids[:8].tolist()) + (", ..." if len(ids) > 8 else "")
    return (
        f"{jobs.work} in round {jobs.round + 1} for client(s) {shown} lost its worker {ATTEMPTS} times in a row; the "
        f"last time: {_line(error)}. If the node ran out of memory, lower runtime.stack or runtime.workers"
    )


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
