"""FedRep: a shared representation and personal heads, trained in turn.

Collins, Hassani, Mokhtari, Shakkottai. Exploiting Shared Representations for Personalized Federated Learning.
arXiv:2102.07078, algorithm 1: a client first fits its head to the representation that it received, which stays as it
is, and then takes steps on the representation with its head as it is; the server averages representations.
Departure: the optimizer of either half is fresh in every round.

Letters: Q shared entries (the representation); x those of the server's model, y a whole local model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fedsim.clients.kept import check_one_state
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Cost
from fedsim.strategies.fedper import FedPer


@dataclass(frozen=True, kw_only=True)
class FedRep(FedPer):
    """Personal heads: first head_epochs on the head alone, then the steps of section local on the rest alone.

    Args:
        head_epochs: passes over a client's data with the shared entries fixed.
    """

    head_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_epochs < 1:
            raise ValueError(f"head_epochs must be at least 1, got {self.head_epochs}")
        check_one_state(self.local)
        _ = self.head, self.body

    @cached_property
    def head(self) -> LocalTraining:
        """Steps on a client's own entries."""
        schedule = replace(self.local.schedule, epochs=self.head_epochs, steps=None)
        return replace(self.local.only(self.split.names), schedule=schedule)

    @cached_property
    def body(self) -> LocalTraining:
        """Steps on the shared entries."""
        return self.local.only(self.split.shared_layout.names)

    @property
    def cost(self) -> Cost:
        return Cost(steps=self._steps)

    def _steps(self, num_examples: Tensor) -> Tensor:
        """[R]: of both halves."""
        halves = [half.schedule.num_steps(num_examples) for half in (self.head, self.body)]
        return torch.stack(halves).sum(0)

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        y = self.opened(clients, x)
        fitted = self.head(clients, y).delta.dense()
        moved = self.body(clients, y - fitted).delta.dense()
        return self.closed(clients, y, fitted + moved)
