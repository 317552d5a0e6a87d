"""Asynchronous FedAvg: every single arrival is an aggregation.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189, section 4; identical weights give FedAsync's surrogate problem.

Letters: N clients, P parameters; d_i the weight of a contribution, p_i a client's importance, tau_i its job's time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Fleet
from fedsim.strategies.asynchronous import State, Weighted
from fedsim.strategies.clocks import Durations, Times, first_weights, importances, schedule_shares


@dataclass(frozen=True, kw_only=True)
class AsyncFedAvg(Weighted):
    """Aggregate each client's update the moment it arrives.

    Args:
        weights: unbiased, d_i = (sum of 1 / tau_j) tau_i p_i; observed, p_i over the share of i; identical, d_i = 1.
    """

    def replies(self, num_clients: int) -> int:
        return 1

    def check_fleet(self, fleet: Fleet, x: Tensor) -> None:
        super().check_fleet(fleet, x)
        if self.weights == "unbiased" and self.job_seconds is None:
            first_weights(importances(self.importance, fleet.num_examples), fleet.job_times(self.local.cost, 1, x=x))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s = self.begun(s, fleet)
        fleet.send(self.free(s, fleet), self.local_update, cost=self.local.cost, x=s.x)
        r = fleet.receive(count=1)
        s, d = self.noted(s, r)
        return self.absorb(s, r, d, self.rule(rng, s.last)), {}

    def identical(self, p: Tensor) -> Tensor:
        return torch.ones_like(p)

    def unbiased(self, p: Tensor, times: Times) -> Tensor:
        return first_weights(p, times)

    def shares(self, seconds: Durations) -> Tensor:
        return schedule_shares(seconds, size=1)
