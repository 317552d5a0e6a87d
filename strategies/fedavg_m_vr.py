"""FedAvg-M-VR: FedAvg-M with a STORM-type correction, the same minibatch at two points.

Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504,
algorithm 3. g may start at zero, or at the mean minibatch gradient at x^0.

Letters: S clients in a round, K local steps, P parameters; x the server's model, x_prev the one before it,
g its momentum, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.direction import GRADIENT, gradient_at
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, choose
from fedsim.strategies.checks import check_beta, check_cohort, check_gamma, check_plain_sgd
from fedsim.strategies.momentum import along, step_size, twice
from fedsim.strategies.server import step_along


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; x_prev: [P], the one before; g: [P], momentum."""

    x: Tensor
    x_prev: Tensor
    g: Tensor


@dataclass(frozen=True, kw_only=True)
class FedAvgMVR:
    """FedAvg-M with variance reduction: two gradients of one minibatch in every local step.

    Args:
        cohort_size: S; null means every client.
        beta: in (0, 1]; 1 is FedAvg.
        gamma: the server's step; null is eta * K * server_lr.
        server_lr: scales the default gamma.
        local: local training.
    """

    cohort_size: int | None = None
    beta: float = 0.1
    gamma: float | None = None
    server_lr: float = 1.0
    local: LocalTraining
    two_points: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_cohort(self.cohort_size, self.server_lr)
        check_beta(self.beta)
        check_gamma(self.gamma)
        check_plain_sgd("fedavg_m_vr", self.local)

    def init(self, x0: Tensor) -> State:
        return State(x0, x0, torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        cohort = choose(fleet.clients, self.cohort_size, rng)
        cost, fold = twice(self.local), Mean(weights="uniform")
        r = fleet.ask(cohort, self.local_update, cost=cost, fold=fold, x=s.x, x_prev=s.x_prev, g=s.g)
        g = r["u"]
        gamma = step_size(self.gamma, self.server_lr, self.local, r)
        return State(step_along(s.x, g, gamma, self.local.num_trainable), s.x, g), {}

    def local_update(self, clients: Cohort, x: Tensor, x_prev: Tensor, g: Tensor) -> Reply:
        u = GRADIENT + (1 - self.beta) * (g - gradient_at(x_prev))
        return {"u": along(clients, self.local(clients, x, u), self.local.lr)}
