"""Executors: where client halves run. Here: what they share, how a cohort is cut into stacks and one stack is run.

Letters: R jobs, C clients of a stack, P entries of a client's vector.

The cut depends on the cohort, the stack width and the least number of stacks alone, and so do the groups in which
stacks are folded: first the stacks of a group in their order, then the groups along a fixed binary tree
(fedsim.sim.tree). So results are the same bits for any number of workers, and a worker elsewhere can send one sum for
whatever groups it has.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.packet import FLOAT_BITS, Packet
from fedsim.fleet import Exact
from fedsim.graph import Inbox
from fedsim.memory import Kept, MemoryRows
from fedsim.metrics import check_names
from fedsim.parts import Parts, Place
from fedsim.sim.links import Uplink
from fedsim.sim.seam import Lent, check_reply
from fedsim.streams import Streams
from fedsim.task import Task
from fedsim.terms import Terms

T = TypeVar("T")
Rows = dict[str, tuple[int, ...]]  # {field: shape of one client's row of it}
MIXED = 8  # times as wide as others are stacks in which vectors are mixed
MAX_GROUPS = 64  # groups of stacks in one call; part of what fixes the bits of a fold


class ClientError(RuntimeError):
    """A client half raised; the message names clients, work and round, and the cause is the client's own exception."""


class Lost(RuntimeError):
    """Another process that takes part is gone, or did not answer within its deadline."""


@dataclass
class Jobs:
    """Work for some clients.

    Args:
        work: name of the strategy's method.
        ids: [R] client ids.
        numbers: [R] each client's job number, part of its random keys.
        models: the distinct broadcasts.
        which: [R] index into `models`.
        memory: {name: [R, ...]} rows that the clients kept, to be read in the store by whoever needs them.
        weights: [R] to fold replies by, or None to keep them apart.
        round: the server step at which they run, from 0; messages count from 1, as metrics do.
        rounds: [R] the server step at which each was sent; `round` for all if left out.
        inbox: of an exchange, what peers sent; of R peers.
    """

    work: str
    ids: Tensor
    numbers: Tensor
    models: list[Mapping[str, Any]]
    which: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    round: int = 0
    rounds: Tensor | None = None
    inbox: Inbox | None = None

    def rows(self, index: Tensor) -> Jobs:
        """Some of these jobs, with the broadcasts they need."""
        used = torch.unique(self.which[index])
        renumber = torch.full((len(self.models),), -1, dtype=torch.int64)
        renumber[used] = torch.arange(len(used))
        return Jobs(
            self.work,
            self.ids[index],
            self.numbers[index],
            [self.models[i] for i in used.tolist()],
            renumber[self.which[index]],
            kept.rows(index) if isinstance(kept := self.memory, Kept) else {k: v[index] for k, v in kept.items()},
            None if self.weights is None else self.weights[index],
            self.round,
            None if self.rounds is None else self.rounds[index],
            None if self.inbox is None else self.inbox.rows(index),
        )


@dataclass(frozen=True)
class Computed:
    """What one job gave: how many bits its reply has, and where its row of every kind lies in what its stack gave."""

    bits: int
    fields: Place | None
    memory: Place | None
    metrics: Place | None


@dataclass
class Results:
    """What jobs gave, in the jobs' order: tensors of one stack, or those of several in parts.

    Args:
        fields: {name: [R, ...]} replies that stand apart.
        sums: {name: [...]} replies that were folded.
        memory: {name: [R, ...]} rows to keep.
        metrics: {name: [R]} diagnostics.
        bits_up: [R] bits of each reply.
    """

    fields: Mapping[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    bits_up: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def apart(self) -> list[Computed]:
        """[R] what each job gave."""
        num_jobs = len(self.bits_up)
        kinds = (Parts.of(rows, num_jobs).places() for rows in (self.fields, self.memory, self.metrics))
        return [Computed(*job) for job in zip(self.bits_up.tolist(), *kinds, strict=True)]

    @classmethod
    def together(cls, jobs: Sequence[Computed]) -> Results:
        """The inverse of `apart`, for any jobs in any order; it takes as many steps as there are stacks among them."""
        return cls(
            Parts.gathered([job.fields for job in jobs]),
            {},
            Parts.gathered([job.memory for job in jobs]),
            Parts.gathered([job.metrics for job in jobs]),
            torch.tensor([job.bits for job in jobs], dtype=torch.int64),
        )


class Executor(ABC):
    """Runs jobs somewhere; the same jobs give the same bits wherever that is.

    Attributes:
        runner: runs one stack.
        width: clients of a stack at most.
        stacks: into so many a call is cut at least; set where it is known how many workers there are.
    """

    runner: StackRunner
    width: int
    stacks: int = 1

    def cut(self, jobs: Jobs) -> list[Tensor]:
        """Indices of each stack of a call; where peers mix vectors, and train nothing, stacks are wider."""
        width = self.width if jobs.inbox is None else MIXED * self.width
        return cut(self.runner.task.num_examples[jobs.ids], width, self.stacks)

    @abstractmethod
    def run(self, jobs: Jobs) -> Results:
        """What the jobs gave."""

    @abstractmethod
    def map(self, work: Callable[..., T], pieces: Sequence[Any], **shared: Any) -> list[T]:
        """Pieces of a task's own work (`fedsim.task.Pool`), which are no client's."""

    def name_of_method(self, work: Callable[..., Any]) -> str:
        """The name by which workers elsewhere know a method of the task.

        Raises:
            ValueError: for any other function.
        """
        if getattr(work, "__self__", None) is not self.runner.task:
            raise ValueError(f"Pool.map: workers elsewhere only know methods of the run's own task, not {work!r}")
        return work.__name__

    def serve(self) -> bool:
        """Run stacks for the loop of another process until that ends; False at once where the loop is here."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Stop the workers."""


def cut(num_examples: Tensor, width: int, stacks: int = 1) -> list[Tensor]:
    """Indices of each stack: clients with more samples first, at most `width` to a stack, and no wider than it takes
    to have `stacks` of them.

    >>> [s.tolist() for s in cut(torch.tensor([5, 9, 5, 0]), 2)]
    [[1, 0], [2, 3]]
    >>> [len(s) for s in cut(torch.ones(10), 5, stacks=4)]
    [3, 3, 3, 1]
    """
    order = torch.argsort(num_examples, descending=True, stable=True)
    return list(order.split(min(width, -(-len(order) // stacks)))) if len(order) else []


def grouped(stacks: list[Tensor]) -> list[list[Tensor]]:
    """Neighbouring stacks whose sums are added first; one stack to a group unless there are more than `MAX_GROUPS`.

    >>> [len(group) for group in grouped([torch.tensor([i]) for i in range(130)])][-3:]
    [3, 3, 1]
    """
    size = -(-len(stacks) // MAX_GROUPS)
    return [stacks[i : i + size] for i in range(0, len(stacks), size)] if stacks else []


@dataclass
class Answer:
    """What one stack gave, as it would travel; no tensor of it lies where somebody else's does.

    Args:
        values: {field: [C, ...], terms of it, or a packet that nobody has decoded yet}.
        memory: {name: [C, ...]} rows to keep.
        metrics: {name: [C]} diagnostics.
    """

    values: dict[str, Tensor | Terms | Packet]
    memory: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass
class StackRunner:
    """Runs one stack: the part that every executor shares.

    Args:
        task: data, field and layout.
        strategy: its methods are the client halves.
        seed: of the run.
        device: where stacks live.
        uplink: how replies are compressed; None sends them as they are.
        rows_on: where rows that clients keep are put when a stack is done.
    """

    task: Task
    strategy: Any
    seed: int
    device: torch.device
    uplink: Uplink | None = None
    rows_on: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _local: threading.local = field(default_factory=threading.local, repr=False)

    def run(self, jobs: Jobs) -> Results:
        """Run one stack; with weights, fields of two or more dimensions come back summed over the stack."""
        answer, num_clients = self.answer(jobs), len(jobs.ids)
        weights = None if jobs.weights is None else jobs.weights.to(self.device)
        bits = torch.zeros(num_clients, dtype=torch.int64)
        fields, sums = {}, {}
        for name in list(answer.values):
            value = answer.values.pop(name)  # what it was made of goes before the next one is formed
            if isinstance(value, Packet):
                bits += value.bits.cpu()
                value = value.decode()
            elif isinstance(value, Terms):
                bits += FLOAT_BITS * self.task.layout.size
                if weights is not None:
                    sums[name] = value.weighted_sum(weights)
                    continue
                value = value.dense()
            elif value.ndim:
                bits += FLOAT_BITS * (value.numel() // num_clients)
            if weights is not None and value.ndim > 1:
                sums[name] = torch.tensordot(weights.to(value), value, dims=1)
            else:
                fields[name] = value if value.ndim else value.expand(num_clients).clone()
        metrics = {k: v.cpu().to(torch.float64) for k, v in answer.metrics.items()}
        return Results(fields, sums, {k: v.to(self.rows_on) for k, v in answer.memory.items()}, metrics, bits)

    def answer(self, jobs: Jobs) -> Answer:
        """What the client half of one stack replies, checked, and compressed by the uplink.

        Raises:
            ClientError: if the client half raised, or broke the rules of the seam (see `fedsim.sim.seam`).
        """
        clients, numbers = torch.stack([jobs.ids, jobs.numbers]).to(self.device)  # in one transfer
        broadcast, inbox = _broadcast(jobs, self.device), jobs.inbox and jobs.inbox.to(self.device)
        cohort = Cohort(
            ids=jobs.ids,
            task=self.task,
            memory=MemoryRows(jobs.memory, len(jobs.ids), self.task.layout.size, self.device),
            streams=Streams(self.seed, clients, numbers),
            device=self.device,
            rounds=jobs.rounds if jobs.rounds is not None else torch.full((len(jobs.ids),), jobs.round),
            pool=self._local.__dict__.setdefault("pool", {}),
        )
        heard = {} if inbox is None else {f"inbox[{k!r}]": v for k, v in inbox.fields.items()}
        lent = Lent({**broadcast, **heard}, cohort.memory, cohort.pool)
        try:
            arguments = (cohort,) if inbox is None else (cohort, inbox)
            reply = getattr(self.strategy, jobs.work)(*arguments, **broadcast)
            check_reply(reply, len(jobs.ids))
            lent.check_unwritten()
        except torch.OutOfMemoryError:  # no fault of a client half's
            raise
        except Exception as error:
            raise ClientError(
                f"{self.name_of(jobs.work)} failed in round {jobs.round + 1} for client(s) {shown(jobs.ids)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        check_names(cohort.metrics, self.name_of(jobs.work))
        values = {name: self._sent(name, value, cohort) for name, value in reply.items()}
        return Answer(*(lent.owned(given) for given in (values, cohort.memory.written, cohort.metrics)))

    def name_of(self, work: str) -> str:
        """A client half's name in messages."""
        return f"{type(self.strategy).__name__}.{work}"

    def _sent(self, name: str, value: Tensor | Terms | Exact | Packet, cohort: Cohort) -> Tensor | Terms | Packet:
        """A field as it travels: only the uplink compresses, and only vectors that are not exact."""
        if isinstance(value, Exact):
            return value.value
        if self.uplink is None or isinstance(value, Packet) or (isinstance(value, Tensor) and value.ndim < 2):
            return value
        v = value.dense() if isinstance(value, Terms) else value
        return self.uplink.encode(name, v, cohort.memory, cohort.streams)


def shown(ids: Tensor) -> str:
    """The first clients of some, for messages."""
    return ", ".join(str(i) for i in ids[:8].tolist()) + (", ..." if len(ids) > 8 else "")


def _broadcast(jobs: Jobs, device: torch.device) -> dict[str, Any]:
    """The stack's own copy of the broadcast: [P] when all clients start from one model, [C, P] otherwise."""
    if len(jobs.models) == 1:
        return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in jobs.models[0].items()}
    return {
        k: torch.stack([torch.as_tensor(jobs.models[m][k]) for m in jobs.which.tolist()]).to(device)
        for k in jobs.models[0]
    }
