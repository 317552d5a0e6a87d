"""SCAFFOLD-M-VR: SCAFFOLD-M with a STORM-type correction, the same minibatch at two points.

Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504,
algorithm 4. The beta before c_i - c makes the direction vanish at the solution.

Letters: N clients, S of them in a round, K local steps, P parameters; x the server's model, x_prev the one before
it, g its momentum, c the mean of the control variates c_i, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.direction import GRADIENT, gradient_at
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Exact, Fleet, choose
from fedsim.strategies.checks import check_beta, check_cohort, check_gamma, check_plain_sgd
from fedsim.strategies.momentum import along, step_size, twice
from fedsim.strategies.server import step_along
from fedsim.terms import Terms


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; x_prev: [P], the one before; g: [P], momentum; c: [P], mean control variate."""

    x: Tensor
    x_prev: Tensor
    g: Tensor
    c: Tensor


@dataclass(frozen=True, kw_only=True)
class ScaffoldMVR:
    """SCAFFOLD-M with variance reduction: two gradients of one minibatch in every local step.

    Args:
        cohort_size: S; null means every client.
        beta: in (0, 1]; 1 is SCAFFOLD.
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
        check_plain_sgd("scaffold_m_vr", self.local)

    def init(self, x0: Tensor) -> State:
        zero = torch.zeros_like(x0)
        return State(x0, x0, zero, zero)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        cohort = choose(fleet.clients, self.cohort_size, rng)
        cost, fold = replace(twice(self.local), vectors_up=2, exact_up=1), Mean(weights="uniform")
        r = fleet.ask(cohort, self.local_update, cost=cost, fold=fold, x=s.x, x_prev=s.x_prev, g=s.g, c=s.c)
        g = r["u"]
        c = s.c + len(r) / len(fleet.clients) * r["dc"]
        gamma = step_size(self.gamma, self.server_lr, self.local, r)
        return State(step_along(s.x, g, gamma, self.local.num_trainable), s.x, g, c), {}

    def local_update(self, clients: Cohort, x: Tensor, x_prev: Tensor, g: Tensor, c: Tensor) -> Reply:
        c_i = clients.memory["c"]
        u = GRADIENT - self.beta * (c_i - c) + (1 - self.beta) * (g - gradient_at(x_prev))
        local = self.local(clients, x, u, mean_grad=True)
        assert local.mean_grad is not None
        clients.memory["c"] = new = local.where_stepped(local.mean_grad, c_i)
        return {"u": along(clients, local, self.local.lr), "dc": Exact(Terms.of(new) - c_i)}
