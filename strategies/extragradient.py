"""Extragradient: a look ahead, then a step from the old point with the operator found there.

Korpelevich. The extragradient method for finding saddle points and other problems. 1976. Two full exchanges a step.

Letters: M clients, P entries; z the iterate, F the mean of the clients' operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, linear
from fedsim.strategies.reference import ALL_OPERATORS, OWN_STEP, check_lr
from fedsim.strategies.server import NO_ROUNDS, Aggregating
from fedsim.strategy import Traits


@dataclass(frozen=True)
class State:
    """x: [P], the iterate z."""

    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Extragradient(Aggregating):
    """Two uncompressed operator evaluations a step; the yardstick of compressed saddle-point methods.

    Args:
        lr: gamma.
    """

    lr: float
    traits: ClassVar[Traits] = Traits(
        needs_all=ALL_OPERATORS, refused=OWN_STEP | {"cohort_size": ALL_OPERATORS} | NO_ROUNDS
    )

    def __post_init__(self) -> None:
        check_lr(self.lr)

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        z_half = s.x - self.lr * self.mean_operator(fleet, s.x, rng)
        return State(s.x - self.lr * self.mean_operator(fleet, z_half, rng)), {}

    def mean_operator(self, fleet: Fleet, z: Tensor, rng: np.random.Generator) -> Tensor:
        """F(z) [P]."""
        rule = self.rule(rng)
        return fleet.ask(fleet.clients, self.operator, fold=linear(rule), z=z).mean("f", rule)

    def operator(self, clients: Cohort, z: Tensor) -> dict[str, Tensor]:
        return {"f": full_gradient(clients, z)}
