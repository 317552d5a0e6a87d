"""Extragradient: a look ahead, then a step from the old point with the operator found there.

Korpelevich. The extragradient method for finding saddle points and other problems. 1976. Two full exchanges a step.

Letters: M clients, P entries; z the iterate, F the mean of the clients' operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.checks import check_lr

UNIFORM = Mean(weights="uniform")


@dataclass(frozen=True)
class State:
    """x: [P], the iterate z."""

    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Extragradient:
    """Two uncompressed operator evaluations a step; the yardstick of compressed saddle-point methods.

    Args:
        lr: gamma.
    """

    lr: float

    def __post_init__(self) -> None:
        check_lr(self.lr)

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        z_half = s.x - self.lr * fleet.ask(fleet.clients, self.operator, fold=UNIFORM, z=s.x)["f"]
        return State(s.x - self.lr * fleet.ask(fleet.clients, self.operator, fold=UNIFORM, z=z_half)["f"]), {}

    def operator(self, clients: Cohort, z: Tensor) -> dict[str, Tensor]:
        return {"f": full_gradient(clients, z)}
