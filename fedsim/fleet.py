"""A fleet: the only way in which a server half talks to its clients.

The simulator's fleet runs on a virtual clock, Flower's on the wall clock; a strategy cannot tell them apart.

Letters: N clients in all, R replies, C clients of a stack, P entries of a client's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from fedsim.graph import Graph, Topology
from fedsim.metrics import Metrics
from fedsim.terms import Terms

Late = Literal["drop", "keep"]
Work = Callable[..., Mapping[str, Any]]
"""A method of the strategy: (cohort, **broadcast) -> {field: [C, ...], Terms, Exact or Packet}."""


class TooFewRows(ValueError):
    """There are fewer replies than a rule can judge, or none; a round that ends with it moves no model.

    Args:
        message: what is missing.
        state: the server's state from which the next round begins; None for that of before the round.
    """

    def __init__(self, message: str, state: Any = None) -> None:
        super().__init__(message)
        self.state = state


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a job costs, known before it runs, so that its duration can be simulated.

    Args:
        steps: local steps, or what takes as long as so many: a number, or a function of the clients' sample counts [R]
            that returns [R].
        vectors_up: vectors of the model's size in one reply: 32 bits an entry, or what the uplink's compressor makes
            of them; 0 if the reply stays with the client until an `exchange`, or is numbers alone.
        exact_up: how many of these vectors are `Exact`, which no uplink compresses.
        scalars_up: numbers in one reply beside the vectors, 32 bits each.
        bits_up: bits of one reply, where that is not a number of such vectors.
    """

    steps: float | Callable[[Tensor], Tensor] = 1
    vectors_up: int = 1
    exact_up: int = 0
    scalars_up: int = 0
    bits_up: int | None = None

    @property
    def answers(self) -> bool:
        """Whether a reply is numbers alone: no work of a round, but what was asked before it."""
        return self.bits_up is None and not self.vectors_up and self.scalars_up > 0

    @property
    def stays(self) -> bool:
        """Whether a reply stays with its client until an `exchange`."""
        return self.bits_up is None and not self.vectors_up and not self.scalars_up

    def steps_of(self, num_examples: Tensor) -> Tensor:
        """[R] float64 local steps."""
        if callable(self.steps):
            return self.steps(num_examples).to(torch.float64)
        return torch.full(num_examples.shape, float(self.steps), dtype=torch.float64)


@dataclass(frozen=True)
class Exact:
    """A field of a reply, [C, P] or terms of it, that must arrive as it is: no uplink compresses it."""

    value: Tensor | Terms


@dataclass(frozen=True)
class Held:
    """A vector [P] of a broadcast that these clients were sent under this name by the last `ask`, and still hold.

    A job that it comes with is the second half of that last one, with its number and so with its random numbers. The
    simulator counts no bits for it; over Flower, where every message starts a process of its own, it travels again.
    """

    value: Tensor


@dataclass(frozen=True)
class Times:
    """How long jobs take: T_i = least_i + an exponential time of mean rest_i; or as drawn.

    Args:
        least, rest: [N] float64 seconds.
        drawn: [N, samples] seconds of clients whose clocks have another law, in which case `least` is their mean.
    """

    least: Tensor
    rest: Tensor
    drawn: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """tau [N]."""
        return self.least + self.rest


class Aggregator(Protocol):
    """Frozen settings of an aggregation rule, one vector from many (see fedsim.aggregate); its input stays as it is.

    A rule that is not linear counts every row once, whatever its weight: a weight is what a client says about itself,
    and a robust rule that believed it would not be robust. Such a rule takes a row with a NaN or an infinity to be
    farther away than any other row.
    """

    foldable: ClassVar[bool]
    """Whether the rule is linear, so that stacks can be folded as they finish."""

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        """Rows [R, P] and sample counts [R] -> [P]."""
        ...


class Fold(Aggregator, Protocol):
    """A linear aggregation: the weighted sum of replies, taken stack by stack so that replies need not be kept."""

    def weigh(self, num_examples: Tensor) -> Tensor:
        """[R] weights of the replies, summing to one, from the clients' sample counts [R]."""
        ...


def weigh(fold: Fold, num_examples: Tensor, given: Tensor | None = None) -> Tensor:
    """[R] weights of a fold: as given [R], or its own; zeros where no client has a sample, so that nothing changes."""
    if given is not None:
        return given
    return fold.weigh(num_examples) if bool((num_examples > 0).any()) else torch.zeros(len(num_examples))


def linear(aggregator: Aggregator) -> Fold | None:
    """The aggregator if replies can be folded by it, else None, so that they are kept apart for it."""
    return cast(Fold, aggregator) if aggregator.foldable else None


@dataclass
class Replies:
    """What came back.

    Args:
        ids: [R] client ids.
        num_examples: [R] samples of each.
        arrived_at: [R] float64 seconds.
        fields: {name: [R, ...]}; after a fold, fields of two or more dimensions are already summed to [...].
        staleness: [R] server steps between the model each worked on and now.
        seconds: [R] float64, from when each was sent its work until its reply was here; of `ask` and `receive`.
        logged: {metric: [R] float64}, what each said of its work (`Cohort.log`), unproven; of `ask` and `receive`.
        in_vain: the server's state from which the next round begins, should these be too few (see `TooFewRows`).
    """

    ids: Tensor
    num_examples: Tensor
    arrived_at: Tensor
    fields: dict[str, Any] = field(default_factory=dict)
    staleness: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    seconds: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    logged: Mapping[str, Tensor] = field(default_factory=dict)
    in_vain: Any = None

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def mean(self, name: str, aggregator: Aggregator) -> Tensor:
        """[P]: one field aggregated; taken as it is where `fold=linear(aggregator)` already did it.

        Raises:
            TooFewRows: if nobody replied, or fewer than the rule can judge.
        """
        if not len(self):
            raise TooFewRows("nobody replied", self.in_vain)
        value: Tensor = self.fields[name]
        if value.ndim <= 1:
            return value
        try:
            return aggregator(value, self.num_examples)
        except TooFewRows as e:
            raise TooFewRows(str(e), self.in_vain) from e

    def __len__(self) -> int:
        return len(self.ids)

    def weighted(self, name: str, weights: Tensor, like: Tensor) -> Tensor:
        """[P]: the sum of weights [R] times one field's rows; zeros like `like` [P] where nothing arrived."""
        if not len(self):
            return torch.zeros_like(like)
        rows: Tensor = self.fields[name]
        if len(self) == 1:  # one multiplication, which costs less than a product of matrices
            return rows[0] * weights.to(rows)
        return torch.tensordot(weights.to(rows), rows, dims=1)


class Fleet(Protocol):
    """Clients that can be given work and asked for replies."""

    clients: Tensor
    num_examples: Tensor
    round: int  # of the run, those included that changed nothing: schedules of clients' learning rates follow it

    @property
    def now(self) -> float:
        """Seconds: virtual in simulation, of the wall clock when deployed."""
        ...

    @property
    def num_at_work(self) -> int:
        """Jobs in flight."""
        ...

    def present(self, at_least: int = 1, with_data: bool = False) -> Tensor:
        """[A] clients that are on line and idle, in ascending order.

        Where fewer than `at_least` are and no job is in flight, whose reply could be received, it waits for more.

        Args:
            at_least: how many are needed; 0 never waits.
            with_data: leave out clients that have no samples.

        Raises:
            ValueError: if so many will never be there.
        """
        ...

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ..., **broadcast: Any) -> None:
        """Start `work` on some idle clients, each with the broadcast tensors ([P], or a number).

        Not every job need end with a reply: a client may be gone by now, or go or fail while it works.
        """
        ...

    def receive(self, *, until: float = inf, count: int | None = None) -> Replies:
        """Wait until a time, or for a number of replies, and return what arrived, in order of arrival.

        These are fewer than `count`, or none, where no more jobs are in flight.
        """
        ...

    def cancel(self, ids: Tensor) -> None:
        """Call off the jobs that these clients were sent: they are idle at once, and their replies never come.

        The work must keep no rows with its clients, since it may have run to its end on a device.
        """
        ...

    def ask(
        self,
        ids: Tensor,
        work: Work,
        *,
        cost: Cost = ...,
        fold: Fold | None = None,
        weights: Tensor | None = None,
        within: float = inf,
        first: int | None = None,
        late: Late = "drop",
        **broadcast: Any,
    ) -> Replies:
        """Send and wait for these clients; the replies that came stand in the order of `ids`.

        Args:
            ids, work, cost, broadcast: see `send`.
            fold: by what replies are added up as they come; None keeps them apart.
            weights: [R] float64 of these clients in that sum; None are those of the fold.
            within: seconds after which no more are waited for.
            first: as many replies to these jobs are waited for; None for all of them.
            late: what becomes of the others. `drop`: their clients are told to stop and are idle again; what they may
                have sent is not counted. `keep`: they go on, and their replies are among those of the next `ask` for
                the same work that ends after they arrive, behind the others, with their staleness.
        """
        ...

    def graph(self, topology: Topology) -> Graph:
        """Who would hear whom among all clients in this round.

        Raises:
            ValueError: if that topology has no graph for so many.
        """
        ...

    def exchange(
        self, replies: Replies, work: Work, *, graph: Graph | None = None, missing: int = 0, **broadcast: Any
    ) -> Replies:
        """Every client of `replies` reads its neighbours' replies: `work(cohort, inbox, **broadcast)`.

        Args:
            replies: of an `ask` whose cost has `vectors_up=0`: they stay with the clients until now.
            work: the second half; its replies again stay with the clients.
            graph: who hears whom of all clients; None for everybody. What a client does not hear because a neighbour
                is not there adds to the weight of its own vector.
            missing: honest vectors of its neighbours that never reach a client, which ones is drawn for each; every
                byzantine vector does.
        """
        ...

    def honest(self, ids: Tensor) -> Tensor:
        """[R] bool: which of these clients are honest; all of them where nobody knows better. For metrics only."""
        ...

    def job_times(self, cost: Cost, samples: int, messages: Tensor | None = None, **broadcast: Any) -> Times:
        """How long such a job takes each of the N clients, for weights that depend on it.

        The simulator knows the law of its clocks, or draws from them; a deployed fleet gives the mean of what it has
        measured, NaN for clients of which it has measured nothing.

        Args:
            cost: of the job.
            samples: how many to draw for each client, where their law is not known.
            messages: [N] how many broadcasts each client is sent with a job, those that it missed included, where a
                compressed downlink makes that matter; one if left out.
            broadcast: what it downloads.
        """
        ...


class Traffic(Protocol):
    """Bits sent so far by all clients, and to them."""

    bits_up: int
    bits_down: int


class DrivenFleet(Fleet, Protocol):
    """A fleet that the loop can run on: it keeps an account, and can be saved."""

    timeline: list[tuple[int, float, float, int]]  # (client, start, finish, round) of the first jobs, if asynchronous
    state_classes: ClassVar[dict[str, type]]

    @property
    def ledger(self) -> Traffic: ...

    def devices(self) -> Mapping[str, Tensor]:
        """{what: [N]} that is known of each client's device; empty in a simulation."""
        ...

    def evaluate(self, ids: Tensor, work: Work, **broadcast: Any) -> Mapping[str, Tensor]:
        """{field: [R]} of what clients say beside the rounds, in the order of `ids`; NaN where one does not answer.

        It takes no time, nothing of it is counted, and what clients write to their memory is forgotten.
        """
        ...

    def end_round(self) -> Metrics:
        """What clients logged and how many replied since the last call; the next round begins."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        ...


def choose(clients: Tensor, count: int | None, rng: np.random.Generator) -> Tensor:
    """[count] distinct clients, uniformly, in ascending order; all of them when `count` is None or their number.

    Raises:
        ValueError: if more are wanted than there are.
    """
    if count is None or count == len(clients):
        return clients
    if count > len(clients):
        raise ValueError(
            f"strategy.cohort_size={count} exceeds the {len(clients)} clients; lower it or raise clients.count"
        )
    picked = np.sort(rng.choice(len(clients), size=count, replace=False))
    return clients[torch.from_numpy(picked)]
