"""Optimistic gradient: one operator a step, corrected by how it changed since the last one.

Popov. A modification of the Arrow-Hurwicz method for search of saddle points. 1980; as a step with a prox it is the
forward-reflected-backward method of Malitsky and Tam. arXiv:1808.04162. Half of extragradient's exchanges a step.

    z <- prox(z - gamma * (2 F(z) - F(z_prev)))

Letters: P entries; z the iterate, z_prev the one before it, F the mean of the clients' operators, gamma the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.fleet import Fleet
from fedsim.strategies.saddle import Saddle
from fedsim.task import Constants


@dataclass(frozen=True)
class State:
    """x: [P], the iterate z; f: [P], F(z_prev), None at first, when z_prev is z."""

    x: Tensor
    f: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class OptimisticGradient(Saddle):
    """One operator evaluation a step, and the last one once more; converges where plain descent-ascent spirals away."""

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def proven(self, constants: Constants, num_entries: int) -> tuple[float, float] | None:
        return self.lr, 1 / (2 * constants.of_mean)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        f = self.mean_operator(fleet, s.x, rng)
        return State(self.prox(s.x - self.lr * (2 * f - (f if s.f is None else s.f)), self.lr), f), {}
