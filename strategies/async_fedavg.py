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

from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.clocks import Importance, Weights, able, durations, first_weights, given_seconds, importances
from fedsim.strategies.server import step_along


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; idle: [I] clients to be sent work; d: [N] weights; started: whether any was sent."""

    x: Tensor
    idle: Tensor
    d: Tensor
    started: bool


@dataclass(frozen=True, kw_only=True)
class AsyncFedAvg:
    """Aggregate each client's update the moment it arrives.

    Args:
        server_lr: eta_g.
        weights: unbiased, d_i = (sum of 1 / tau_j) tau_i p_i; identical, d_i = 1.
        importance: p_i, by samples or uniform.
        job_seconds: tau_i, where the fleet can't know; one number a client.
        local: local training.
    """

    server_lr: float = 1.0
    weights: Weights = "unbiased"
    importance: Importance = "uniform"
    job_seconds: tuple[float, ...] | None = None
    local: LocalTraining

    def init(self, x0: Tensor) -> State:
        return State(x0, torch.zeros(0, dtype=torch.int64), torch.zeros(0), False)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        idle, d = (s.idle, s.d) if s.started else (able(fleet), self.client_weights(fleet, s.x))
        fleet.send(idle, self.local_update, cost=self.local.cost, x=s.x)
        r = fleet.receive(count=1)
        delta, weight = r.weighted("delta", d[r.ids], like=s.x), float(d[r.ids].sum())
        x = step_along(s.x, delta, self.server_lr, self.local.num_trainable, weight)
        return State(x, r.ids, d, True), {}

    def client_weights(self, fleet: Fleet, x: Tensor) -> Tensor:
        """d [N]."""
        if self.weights == "identical":
            return torch.ones(len(fleet.clients), dtype=torch.float64)
        p = importances(self.importance, fleet.num_examples)
        if self.job_seconds is not None:
            return first_weights(p, given_seconds(self.job_seconds, p))
        return first_weights(p, durations(fleet, self.local.cost, x))

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x).delta}
