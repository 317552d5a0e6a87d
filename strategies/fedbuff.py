"""FedBuff with a common restart: the first c arrivals are aggregated and start together from the new model.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189, section 4 (the streaming form of Nguyen et al. is `fedbuff_stream`).

Letters: N clients, c the buffer's size, P parameters; d_i the weight of a contribution, p_i a client's importance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Fleet
from fedsim.strategies.asynchronous import State, Weighted, Weights
from fedsim.strategies.clocks import Durations, Times, buffer_weights, check_fits, positive, schedule_shares


@dataclass(frozen=True, kw_only=True)
class FedBuff(Weighted):
    """Aggregate the first c arrivals; those c start again together.

    Args:
        buffer_size: c.
        weights: unbiased or observed, p_i over the share of aggregations that contain i; identical, 1 / c.
    """

    buffer_size: int = 10
    weights: Weights = "identical"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("buffer_size", self.buffer_size)

    def replies(self, num_clients: int) -> int:
        return self.buffer_size

    def check_fleet(self, fleet: Fleet, x: Tensor) -> None:
        super().check_fleet(fleet, x)
        check_fits("buffer_size", self.buffer_size, fleet)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s = self.begun(s, fleet)
        fleet.send(self.free(s, fleet), self.local_update, cost=self.local.cost, x=s.x)
        r = fleet.receive(count=self.buffer_size)
        s, d = self.noted(s, r)
        return self.absorb(s, r, d, self.rule(rng, s.last)), {}

    def identical(self, p: Tensor) -> Tensor:
        return torch.full_like(p, 1 / self.buffer_size)

    def unbiased(self, p: Tensor, times: Times) -> Tensor:
        return buffer_weights(p, times, self.buffer_size)

    def shares(self, seconds: Durations) -> Tensor:
        return schedule_shares(seconds, size=self.buffer_size)
