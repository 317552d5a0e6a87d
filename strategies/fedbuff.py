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

from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.clocks import Importance, Weights, able, buffer_weights, durations, importances
from fedsim.strategies.server import step_along


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; idle: [I] clients to be sent work; d: [N] weights; started: whether any was sent."""

    x: Tensor
    idle: Tensor
    d: Tensor
    started: bool


@dataclass(frozen=True, kw_only=True)
class FedBuff:
    """Aggregate the first c arrivals; those c start again together.

    Args:
        buffer_size: c.
        server_lr: eta_g.
        weights: unbiased, p_i over the share of aggregations that contain i; identical, 1 / c.
        importance: p_i, by samples or uniform.
        local: local training.
    """

    buffer_size: int = 10
    server_lr: float = 1.0
    weights: Weights = "identical"
    importance: Importance = "uniform"
    local: LocalTraining

    def __post_init__(self) -> None:
        if self.buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {self.buffer_size}")

    def init(self, x0: Tensor) -> State:
        return State(x0, torch.zeros(0, dtype=torch.int64), torch.zeros(0), False)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        idle, d = (s.idle, s.d) if s.started else (able(fleet), self.client_weights(fleet, s.x))
        fleet.send(idle, self.local_update, cost=self.local.cost, x=s.x)
        r = fleet.receive(count=self.buffer_size)
        delta, weight = r.weighted("delta", d[r.ids], like=s.x), float(d[r.ids].sum())
        x = step_along(s.x, delta, self.server_lr, self.local.num_trainable, weight)
        return State(x, r.ids, d, True), {}

    def client_weights(self, fleet: Fleet, x: Tensor) -> Tensor:
        """d [N].

        Raises:
            ValueError: if the buffer is larger than the federation.
        """
        n = len(able(fleet))
        if self.buffer_size > n:
            raise ValueError(f"strategy.buffer_size={self.buffer_size} exceeds the {n} clients with data; lower it")
        if self.weights == "identical":
            return torch.full((len(fleet.clients),), 1 / self.buffer_size, dtype=torch.float64)
        p = importances(self.importance, fleet.num_examples)
        return buffer_weights(p, durations(fleet, self.local.cost, x), self.buffer_size)

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x).delta}
