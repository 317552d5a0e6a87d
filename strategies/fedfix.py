"""FedFix: asynchronous averaging at fixed time intervals.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189. Whoever has finished when a window ends contributes, relative to the model it
started from, and starts again from the new one; the others keep working.

Letters: N clients, R replies in a window, P parameters; d_i the weight of a contribution, p_i a client's importance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.fleet import Fleet, TooFewRows
from fedsim.strategies.asynchronous import State, Weighted
from fedsim.strategies.clocks import Durations, Times, schedule_shares, window_weights


@dataclass(frozen=True, kw_only=True)
class FedFix(Weighted):
    """Aggregate whatever arrived, at fixed time intervals.

    A window of fewer arrivals than a robust rule can judge changes nothing, and says so in the metric `too_few`.

    Args:
        interval: seconds of a window.
        weights: unbiased or observed, d_i = p_i over the chance to arrive in a window; identical, d_i = p_i.
    """

    interval: float
    waits_for: ClassVar[int] = 0  # windows end on time, whoever is there

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.interval > 0:
            raise ValueError(f"interval must be positive seconds, got {self.interval}")

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s = self.begun(s, fleet)
        fleet.send(self.free(s, fleet), self.local_update, cost=self.local.cost, x=s.x)
        r = fleet.receive(until=(s.round + 1) * self.interval)
        known, d = self.noted(s, r)
        try:
            return self.absorb(known, r, d, self.rule(rng, s.last)), {}
        except TooFewRows:  # nobody contributed
            return replace(s, idle=r.ids, round=s.round + 1), {"too_few": 1}

    def identical(self, p: Tensor) -> Tensor:
        return p

    def unbiased(self, p: Tensor, times: Times) -> Tensor:
        return window_weights(p, times, self.interval)

    def shares(self, seconds: Durations) -> Tensor:
        return schedule_shares(seconds, interval=self.interval)
