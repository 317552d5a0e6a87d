"""FedFix: asynchronous averaging at fixed time intervals.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189. Whoever has finished when a window ends contributes, relative to the model it
started from, and starts again from the new one; the others keep working.

Letters: N clients, R replies in a window, P parameters; d_i the weight of a contribution, p_i a client's importance.
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
from fedsim.strategies.clocks import Importance, Weights, able, durations, given_seconds, importances, window_weights
from fedsim.strategies.server import step_along


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; idle: [I] clients to be sent work; d: [N] weights; window: windows so far."""

    x: Tensor
    idle: Tensor
    d: Tensor
    window: int


@dataclass(frozen=True, kw_only=True)
class FedFix:
    """Aggregate whatever arrived, at fixed time intervals.

    Args:
        interval: seconds of a window.
        server_lr: eta_g.
        weights: unbiased, d_i = p_i over the chance to arrive in a window; identical, d_i = p_i.
        importance: p_i, by samples or uniform.
        job_seconds: how long a job takes each client, where the fleet can't know; one number a client.
        local: local training.
    """

    interval: float
    server_lr: float = 1.0
    weights: Weights = "unbiased"
    importance: Importance = "uniform"
    job_seconds: tuple[float, ...] | None = None
    local: LocalTraining

    def __post_init__(self) -> None:
        if not self.interval > 0:
            raise ValueError(f"interval must be positive seconds, got {self.interval}")

    def init(self, x0: Tensor) -> State:
        return State(x0, torch.zeros(0, dtype=torch.int64), torch.zeros(0), 0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        idle, d = (s.idle, s.d) if s.window else (able(fleet), self.client_weights(fleet, s.x))
        fleet.send(idle, self.local_update, cost=self.local.cost, x=s.x)
        r = fleet.receive(until=(s.window + 1) * self.interval)
        delta, weight = r.weighted("delta", d[r.ids], like=s.x), float(d[r.ids].sum())
        x = step_along(s.x, delta, self.server_lr, self.local.num_trainable, weight)
        return State(x, r.ids, d, s.window + 1), {}

    def client_weights(self, fleet: Fleet, x: Tensor) -> Tensor:
        """d [N]."""
        p = importances(self.importance, fleet.num_examples)
        if self.weights == "identical":
            return p
        if self.job_seconds is not None:
            return window_weights(p, given_seconds(self.job_seconds, p), self.interval)
        return window_weights(p, durations(fleet, self.local.cost, x), self.interval)

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x).delta}
