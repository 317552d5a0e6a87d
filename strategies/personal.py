"""What strategies share whose clients keep some entries of the model for themselves.

A client keeps these in its memory from x0 on; they are never sent, never averaged and cost no bits. So that nothing
between the two halves has to know, server and clients exchange vectors of the shared entries alone: `ask` sends them,
`closed` replies them, links and ledger see vectors of that size (`sent`), and only here the two parts meet. The entries
in the server's own x stay at x0. Only these strategies have such a field: in the others every vector that is kept or
sent beside the model (a control variate, a momentum) would need a meaning for entries that stay at home.

Letters: C clients of a stack, P entries of a model, Q of them shared, H a client's own.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Aggregator, Mean
from fedsim.clients.kept import keep, recalled, x0
from fedsim.clients.local_training import Reply
from fedsim.clients.oracle import full_loss
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.params import Layout, Split
from fedsim.strategies.server import Rule, ServerState, Synchronous
from fedsim.strategy import Traits

S = TypeVar("S", bound=ServerState)
OWN = "personal"  # the name of these entries in a client's memory


@dataclass(frozen=True, kw_only=True)
class Personal(Synchronous):
    """FedAvg on the shared entries; how a client trains both parts is a strategy's own.

    Args:
        personal: patterns on the names of parameters and buffers (`head.*`) that stay with the client; null is what
            the strategy is about, [] none.
        aggregator: how updates become one; the mean weighs clients by their samples unless told otherwise.
        layout: of the model.
    """

    personal: tuple[str, ...] | None = None
    aggregator: Rule = Mean()
    layout: Layout
    traits: ClassVar[Traits] = Traits(bears_weights=True, own_models=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.split

    @abstractmethod
    def usual(self) -> tuple[str, ...]:
        """Names of the entries that stay with the client if the user names none.

        Raises:
            ValueError: if the model has none of that kind.
        """

    @cached_property
    def split(self) -> Split:
        """Which entries are shared and which a client's own."""
        if self.personal is None:
            return Split(self.layout, self.usual())
        try:
            return Split.matching(self.layout, self.personal)
        except ValueError as e:
            raise ValueError(f"personal: {e}") from e

    def sent(self, layout: Layout) -> Layout:
        return self.split.shared_layout

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=self.split.shared(s.x))
        return self.step(s, r.mean("delta", rule)), {}

    @abstractmethod
    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        """The client half; x is [Q]."""

    def opened(self, clients: Cohort, x: Tensor) -> Tensor:
        """[C, P]: the shared entries x [Q] that these clients received, and their own."""
        return self.split.joined(x, recalled(clients, OWN, self.split.own(x0(clients))))

    def closed(self, clients: Cohort, y: Tensor, delta: Tensor) -> Reply:
        """The reply of clients that moved from y to y - delta, [C, P] both: they keep their own entries."""
        if self.split.names:
            keep(clients, OWN, self.split.own(y) - self.split.own(delta))
        return {"delta": self.split.shared(delta)}

    def personal_model(self, clients: Cohort, x: Tensor) -> Tensor:
        return self.opened(clients, self.split.shared(x))

    def losses_at(self, fleet: Fleet, x: Tensor, ids: Tensor) -> Tensor:
        return super().losses_at(fleet, self.split.shared(x), ids)

    def local_loss(self, clients: Cohort, x: Tensor) -> Reply:
        return {"loss": full_loss(clients, self.opened(clients, x))}

    def rule(self, rng: np.random.Generator, last: Tensor | None = None) -> Aggregator:
        return super().rule(rng, None if last is None else self.split.shared(last))

    def step(self, s: S, d: Tensor, lr: float | None = None, weight: float = 1.0) -> S:
        """As any server's, along d [Q]; entries that stay with the clients are left as they are, by decay too."""
        own = self.split.own(s.x)
        after = super().step(s, self.split.joined(d, torch.zeros_like(own)), lr, weight)
        return replace(after, x=self.split.joined(self.split.shared(after.x), own))
