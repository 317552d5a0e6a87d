"""Methods for saddle points that ask every client for its operator and step by themselves.

Letters: C clients of a stack, P entries; z the iterate, F the mean of the clients' operators, gamma the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, linear
from fedsim.prox import FREE, Prox
from fedsim.strategies.server import NO_ROUNDS, Aggregating
from fedsim.strategy import Traits
from fedsim.task import Constants

ALL_OPERATORS = "every step needs the operators of all clients"
OWN_STEP = {
    "selection": "it asks all clients, or so many drawn uniformly, or its mean operator would be another",
    "server_lr": "it has a step of its own; set strategy.lr",
    "server_optimizer": "it steps by strategy.lr from a point that it left to look ahead, which no other rule does",
}
"""Why a method for saddle points has not these keys of a server."""


@dataclass(frozen=True, kw_only=True)
class Saddle(Aggregating):
    """Steps along the mean operator.

    Args:
        lr: gamma.
        prox: of the task.
    """

    lr: float
    prox: Prox = FREE
    traits: ClassVar[Traits] = Traits(
        needs_all=ALL_OPERATORS, refused=OWN_STEP | {"cohort_size": ALL_OPERATORS} | NO_ROUNDS
    )

    def __post_init__(self) -> None:
        check_lr(self.lr)

    def proven(self, constants: Constants, num_entries: int) -> tuple[float, float] | None:
        return self.lr, 1 / constants.of_mean

    def mean_operator(self, fleet: Fleet, z: Tensor, rng: np.random.Generator) -> Tensor:
        """F(z) [P]."""
        rule = self.rule(rng)
        return fleet.ask(fleet.clients, self.operator, fold=linear(rule), z=z).mean("f", rule)

    def operator(self, clients: Cohort, z: Tensor) -> dict[str, Tensor]:
        return {"f": full_gradient(clients, z)}


def check_lr(lr: float) -> None:
    """lr is the step that a strategy takes itself."""
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
