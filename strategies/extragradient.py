"""Extragradient: a look ahead, then a step from the old point with the operator found there.

Korpelevich. The extragradient method for finding saddle points and other problems. 1976. Two full exchanges a step.
Over a compressed uplink both exchanges are compressed, and it no longer converges: the baseline of MASHA.

Letters: P entries; z the iterate, F the mean of the clients' operators, gamma the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.fleet import Fleet
from fedsim.strategies.saddle import Saddle


@dataclass(frozen=True)
class State:
    """x: [P], the iterate z."""

    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Extragradient(Saddle):
    """Two operator evaluations a step; the yardstick of compressed saddle-point methods."""

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        z_half = self.prox(s.x - self.lr * self.mean_operator(fleet, s.x, rng), self.lr)
        return State(self.prox(s.x - self.lr * self.mean_operator(fleet, z_half, rng), self.lr)), {}
