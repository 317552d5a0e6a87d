"""Ray actors and the calls that they are busy with: they are started, awaited and, when they die or hang, brought back.

One call is outstanding for each actor, so the driver always knows who does what and since when. What actors run is
theirs: an actor's class takes the number of its threads, and its `ready` the setting, which is the same for all. An
actor returns parcels, which nobody opens here, or a `Failure`, or an exception for that it is lost to the others.

Letters: W workers.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.config import first_line
from fedsim.sim.executor import Lost
from fedsim.sim.failure import Failure
from fedsim.sim.packing import Parcel
from fedsim.sim.ray_runtime import connect, environment

ATTEMPTS = 4  # how often one group, or one worker's start, is tried before the run gives up
JOIN_SECONDS = 60.0  # for the first node with room to join a cluster that has none yet
START_SECONDS = 300.0  # for a worker to be placed, to import torch and to fetch the task

_log = logging.getLogger("fedsim")


Tag = tuple[int, int]


class WorkersLost(Lost):
    """Workers did not do what a run can't do without, and Ray itself is there: to start it anew would not help."""


def pickler() -> type[pickle.Pickler]:
    """Ray's own, which also takes lambdas and classes of `__main__`."""
    import ray.cloudpickle

    return ray.cloudpickle.Pickler


@dataclass(eq=False)
class Worker:
    """An actor and the one call that it is busy with.

    Args:
        actor: its handle.
        ref: the outstanding call, or None when the worker is free.
        tag: (number of the run, which of its parts) of that call; None while the worker gets ready.
        seconds: after which the call counts as hung; deadline: when that is, by the monotonic clock.
        failures: starts in a row that came to nothing.
        epoch: of the group of workers that it is in; 0 for none.
    """

    actor: Any
    ref: Any = None
    tag: Tag | None = None
    seconds: float = START_SECONDS
    deadline: float = 0.0
    failures: int = 0
    epoch: int = 0


class RayPool:
    """The actors of one run, and the runtime that they need.

    Args:
        actor: what runs in the workers' processes.
        setting: for each of them to get ready with; put into the object store once.
        workers: how many; None for as many as there is room for.
        threads: intra-op threads of each, and its CPUs.
        gpus: of each.
        address: "auto" or "host:port" of a running cluster; None starts a runtime on this machine. A runtime that
            this process is already connected to is used, whatever the address.

    Raises:
        ValueError: if there is no cluster at the address, or no room for a worker.
    """

    def __init__(
        self, actor: type, setting: Parcel, *, workers: int | None, threads: int, gpus: int, address: str | None
    ) -> None:
        import ray

        self.ray, self.workers = ray, list[Worker]()
        self.resubmitted = 0  # calls that ran again because a worker was lost
        self._actor, self._threads, self._gpus, self._runs = actor, threads, gpus, 0
        self._started = connect(ray, address, workers, threads, gpus, sum(a.nbytes for a in setting[1]))
        self.others_join = not self._started or address is not None
        try:
            self.setting = ray.put(setting)
            for _ in range(self._count(workers, joining=address is not None)):
                self.workers.append(self._start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers, and the runtime if it was started here."""
        for worker in self.workers:
            self.ray.kill(worker.actor)
        self.workers = []
        self.__dict__.pop("setting", None)
        if self._started:
            self._started = False
            self.ray.shutdown()

    def in_order(
        self,
        count: int,
        ask: Callable[[Worker, int], Any],
        seconds: Callable[[int], float],
        what: Callable[[int], str],
        relief: str,
    ) -> Iterator[Any]:
        """What some calls that know nothing of each other return, in their order, by whichever worker is free.

        Args:
            count: of calls; each must be a pure function, for it runs again where its worker is lost.
            ask: (a worker, which call) -> reference to what it was asked to do.
            seconds: after which this call counts as hung.
            what: this call is, for messages.
            relief: what helps against a node that runs out of memory.

        Raises:
            WorkersLost: if one call, or every worker's start, was lost `ATTEMPTS` times in a row.
            Exception: what a worker sent as a `Failure`.
        """
        self._runs += 1
        run, todo, lost, done = self._runs, deque(range(count)), [0] * count, dict[int, Any]()
        for following in range(count):
            while following not in done:
                for worker in self.workers:
                    if worker.ref is None and todo:
                        index = todo.popleft()
                        self.call(worker, ask(worker, index), (run, index), seconds(index))
                tag, outcome = self.next_outcome()
                if tag is None or tag[0] != run:
                    continue  # a worker got ready, or finished what a run that failed had left behind
                index = tag[1]
                if isinstance(outcome, Failure):
                    raise outcome.error from outcome.cause
                if not isinstance(outcome, Exception):
                    done[index] = outcome
                    continue
                lost[index] += 1
                self.resubmitted += 1
                if lost[index] == ATTEMPTS:
                    raise WorkersLost(
                        f"{what(index)} lost its worker {ATTEMPTS} times in a row; the last time: "
                        f"{first_line(outcome)}. If the node ran out of memory, {relief}"
                    ) from outcome
                _log.warning("a worker was lost (%s); run again: %s", first_line(outcome), what(index))
                todo.appendleft(index)
            yield done.pop(following)

    def call(self, worker: Worker, ref: Any, tag: Tag, seconds: float) -> None:
        """Note what a worker was just asked to do."""
        worker.ref, worker.tag, worker.seconds, worker.deadline = ref, tag, seconds, time.monotonic() + seconds

    def each(self, calls: Sequence[tuple[Worker, Any]], seconds: float) -> list[Any] | Exception:
        """What every one of some calls that wait for each other returned.

        Args:
            calls: [W] (worker, reference to what it was asked to do).
            seconds: after which one counts as hung.

        Returns:
            [W] values; or how one worker was lost, at once: the others may still be busy and are not asked any more.
        """
        self._runs += 1
        run = self._runs
        for place, (worker, ref) in enumerate(calls):
            self.call(worker, ref, (run, place), seconds)
        found: dict[int, Any] = {}
        while len(found) < len(calls):
            tag, outcome = self.next_outcome()
            if tag is not None and tag[0] == run:
                if isinstance(outcome, Exception):
                    return outcome
                found[tag[1]] = outcome
        return [found[place] for place in range(len(calls))]

    def free(self, seconds: float) -> list[Worker]:
        """The workers that are ready and idle once none of them is busy any more, or after some seconds."""
        until = time.monotonic() + seconds
        while busy := {w.ref: w.deadline for w in self.workers if w.ref is not None}:
            next_deadline = min(busy.values())
            wait = max(0.0, min(until, next_deadline) - time.monotonic())
            if not self.ray.wait(list(busy), num_returns=1, timeout=wait)[0] and until < next_deadline:
                break
            self.next_outcome()
        return [w for w in self.workers if w.ref is None]

    def next_outcome(self) -> tuple[Tag | None, Any]:
        """Wait for one worker: (which call or None, what it returned or how the worker was lost)."""
        busy = {w.ref: w for w in self.workers if w.ref is not None}
        first = min(busy.values(), key=lambda w: w.deadline)
        ready, _ = self.ray.wait(list(busy), num_returns=1, timeout=max(0.0, first.deadline - time.monotonic()))
        worker = busy[ready[0]] if ready else first
        tag, ref = worker.tag, worker.ref
        worker.ref = worker.tag = None
        try:
            if not ready:
                raise TimeoutError(f"no answer within {worker.seconds:g} s")
            outcome = self._fetch(ref, worker.seconds)
        except (self.ray.exceptions.RayError, TimeoutError) as error:
            self._recover(worker, error, getting_ready=tag is None, hung=isinstance(error, TimeoutError))
            return tag, error
        worker.failures = 0
        if tag is None and outcome is not None:
            raise outcome.error from outcome.cause
        return tag, outcome

    def _fetch(self, ref: Any, seconds: float) -> Any:
        """What a finished call returned; the bytes may still have to come from another node."""
        try:
            return self.ray.get(ref, timeout=seconds)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, self.ray.exceptions.RayError):
                raise cause from None  # an argument was lost with its node, say
            raise WorkersLost(f"a Ray worker failed outside of any client's work: {error}") from None

    def _room(self, resources: Mapping[str, float]) -> int:
        if self._gpus:
            return int(resources.get("GPU", 0)) // self._gpus
        return int(resources.get("CPU", 0)) // self._threads

    def _count(self, workers: int | None, *, joining: bool) -> int:
        until = time.monotonic() + JOIN_SECONDS * joining
        while (room := self._room(have := self.ray.cluster_resources())) < 1 and time.monotonic() < until:
            time.sleep(0.5)
        if room < 1:
            raise ValueError(
                f"the Ray cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs, but a worker needs "
                f"{self._threads} CPU(s){' and a GPU' if self._gpus else ''}; add nodes, or lower runtime.threads"
            )
        if workers is not None and workers > room and not self.others_join:
            raise ValueError(
                f"runtime.workers: {workers} Ray workers were asked for, and this machine has {room} GPU(s), one "
                "for each; lower it, or leave it at auto"
            )
        if workers is not None and workers > room:
            _log.warning("%d Ray workers were asked for, but there is room for %d; the rest wait", workers, room)
        return room if workers is None else workers

    def _start(self) -> Worker:
        worker = Worker(self._create())
        self._get_ready(worker)
        return worker

    def _create(self) -> Any:
        remote = self.ray.remote(
            num_cpus=self._threads,
            num_gpus=self._gpus,
            max_restarts=-1,
            max_task_retries=0,  # groups are sent again from here, to whoever is free
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment(self._threads)},
        )
        return remote(self._actor).remote(self._threads)

    def _get_ready(self, worker: Worker) -> None:
        worker.ref = worker.actor.ready.options(max_task_retries=-1).remote(self.setting)
        worker.tag, worker.epoch = None, 0
        worker.seconds, worker.deadline = START_SECONDS, time.monotonic() + START_SECONDS

    def _recover(self, worker: Worker, error: BaseException, *, getting_ready: bool, hung: bool) -> None:
        """Bring a worker back: its actor restarts by itself unless it hangs or did not even start."""
        if getting_ready:
            worker.failures += 1
            free = {k: v for k, v in self.ray.available_resources().items() if k in ("CPU", "GPU")}
            _log.warning(
                "a Ray worker did not start: %s; free in the cluster: %s", first_line(error), free or "nothing"
            )
            if all(w.failures >= ATTEMPTS for w in self.workers):
                raise WorkersLost(
                    f"no Ray worker could be started in {ATTEMPTS} attempts each; the last one: {error}; see that "
                    "fedsim and your own modules can be imported on every node, and that the cluster has free CPUs or "
                    f"GPUs (now: {free or 'none'})"
                ) from error
            self.ray.kill(worker.actor)
            worker.actor = self._create()
        elif hung:
            self.ray.kill(worker.actor, no_restart=False)
        self._get_ready(worker)
