"""FedAvg-M: local steps along a mix of the fresh gradient and the server's momentum.

Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504,
algorithm 1; with partial participation this is FedCM (Xu et al., arXiv:2106.10874). g needs no momentum buffer of
its own: with x frozen it is the exponential moving average of the clients' gradients.

Departure: where clients take different numbers of steps, each one's change is divided by its own eta * K_i.

Letters: S clients in a round, K local steps, P parameters; x the server's model, g its momentum, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.direction import GRADIENT
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, choose
from fedsim.strategies.checks import check_beta, check_cohort, check_gamma, check_plain_sgd
from fedsim.strategies.momentum import along, step_size
from fedsim.strategies.server import step_along


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; g: [P], the mean direction of the last round's steps."""

    x: Tensor
    g: Tensor


@dataclass(frozen=True, kw_only=True)
class FedAvgM:
    """FedAvg with momentum in the local steps; beta is the weight of the fresh gradient.

    Args:
        cohort_size: S; null means every client.
        beta: in (0, 1]; small is heavy momentum, 1 is FedAvg.
        gamma: the server's step; null is eta * K * server_lr.
        server_lr: scales the default gamma.
        local: local training.
    """

    cohort_size: int | None = None
    beta: float = 0.1
    gamma: float | None = None
    server_lr: float = 1.0
    local: LocalTraining

    def __post_init__(self) -> None:
        check_cohort(self.cohort_size, self.server_lr)
        check_beta(self.beta)
        check_gamma(self.gamma)
        check_plain_sgd("fedavg_m", self.local)

    def init(self, x0: Tensor) -> State:
        return State(x0, torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        cohort = choose(fleet.clients, self.cohort_size, rng)
        r = fleet.ask(cohort, self.local_update, cost=self.local.cost, fold=Mean(weights="uniform"), x=s.x, g=s.g)
        g = r["u"]
        gamma = step_size(self.gamma, self.server_lr, self.local, r)
        return State(step_along(s.x, g, gamma, self.local.num_trainable), g), {}

    def local_update(self, clients: Cohort, x: Tensor, g: Tensor) -> Reply:
        local = self.local(clients, x, self.beta * GRADIENT + (1 - self.beta) * g)
        return {"u": along(clients, local, self.local.lr)}
