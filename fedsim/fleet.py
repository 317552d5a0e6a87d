"""A fleet: the only way in which a server half talks to its clients.

The simulator's fleet runs on a virtual clock, Flower's on the wall clock; a strategy cannot tell them apart.

Letters: N clients in all, R replies, C clients of a stack, P entries of a client's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from torch import Tensor

Work = Callable[..., Mapping[str, Any]]
"""A method of the strategy: (cohort, **broadcast) -> {field: [C, ...] or Packet}."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a job costs, known before it runs, so that its duration can be simulated.

    Args:
        steps: local steps: a number, or a function of the clients' sample counts [R] that returns [R].
        vectors_up: vectors of the model's size in one reply: 32 bits an entry, or what the uplink's compressor makes
            of them.
        bits_up: bits of one reply, where that is not a number of such vectors.
    """

    steps: int | Callable[[Tensor], Tensor] = 1
    vectors_up: int = 1
    bits_up: int | None = None

    def steps_of(self, num_examples: Tensor) -> Tensor:
        """[R] float64 local steps."""
        if callable(self.steps):
            return self.steps(num_examples).to(torch.float64)
        return torch.full(num_examples.shape, float(self.steps), dtype=torch.float64)


class Aggregator(Protocol):
    """One vector from many: see fedsim.aggregate."""

    foldable: ClassVar[bool]

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        """Rows [R, P] and sample counts [R] -> [P]."""
        ...


class Fold(Aggregator, Protocol):
    """A linear aggregation: the weighted sum of replies, taken stack by stack so that replies need not be kept."""

    def weigh(self, num_examples: Tensor) -> Tensor:
        """[R] weights of the replies, summing to one, from the clients' sample counts [R]."""
        ...


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
    """

    ids: Tensor
    num_examples: Tensor
    arrived_at: Tensor
    fields: dict[str, Any] = field(default_factory=dict)
    staleness: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def mean(self, name: str, aggregator: Aggregator) -> Tensor:
        """[P]: one field aggregated; taken as it is where `fold=linear(aggregator)` already did it."""
        value: Tensor = self.fields[name]
        if len(self) and value.ndim > 1:
            return aggregator(value, self.num_examples)
        return value

    def __len__(self) -> int:
        return len(self.ids)


class Fleet(Protocol):
    """Clients that can be given work and asked for replies."""

    clients: Tensor
    now: float

    def send(self, ids: Tensor, work: Work, *, cost: Cost = ..., **broadcast: Tensor) -> None:
        """Start `work` on some idle clients, each with the broadcast tensors ([P], or a number)."""
        ...

    def receive(self, *, until: float = inf, count: int | None = None) -> Replies:
        """Wait until a time, or for a number of replies, and return what arrived, in order of arrival."""
        ...

    def ask(
        self, ids: Tensor, work: Work, *, cost: Cost = ..., fold: Fold | None = None, **broadcast: Tensor
    ) -> Replies:
        """Send and wait for all of these clients; replies stand in the order of `ids`."""
        ...

    def exchange(self, replies: Replies, work: Work, **broadcast: Tensor) -> Replies:
        """Every client of `replies` reads the others' replies and works on them."""
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
