"""SCAFFOLD-M: control variates and momentum in the local steps.

Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504,
algorithm 2. c_i is the mean of the raw gradients h, not of the mixed directions.

Letters: N clients, S of them in a round, K local steps, P parameters; x the server's model, g its momentum,
c the mean of the control variates c_i, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.direction import GRADIENT
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.config import FromTable
from fedsim.fleet import Exact, Fleet, choose
from fedsim.optim import Optimizer
from fedsim.strategies.checks import check_beta, check_cohort, check_gamma, check_plain_sgd
from fedsim.strategies.momentum import along, step_size
from fedsim.strategies.server import Server
from fedsim.terms import Terms


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; g: [P], momentum; c: [P], mean control variate; server: the optimizer's side."""

    x: Tensor
    g: Tensor
    c: Tensor
    server: Server
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class ScaffoldM:
    """SCAFFOLD with momentum in the local steps; beta is the weight of the fresh gradient.

    Args:
        cohort_size: S; null means every client.
        beta: in (0, 1]; small is heavy momentum, 1 is SCAFFOLD.
        gamma: the server's step; null is eta * K * server_lr.
        server_lr: scales the default gamma.
        server_optimizer: a rule of the optimizer core for the server's step along gamma * g.
        local: local training.
    """

    cohort_size: int | None = None
    beta: float = 0.1
    gamma: float | None = None
    server_lr: float = 1.0
    server_optimizer: Annotated[Optimizer | None, FromTable("server_optimizer")] = None
    local: LocalTraining

    def __post_init__(self) -> None:
        check_cohort(self.cohort_size, self.server_lr)
        check_beta(self.beta)
        check_gamma(self.gamma)
        check_plain_sgd("scaffold_m", self.local)

    def init(self, x0: Tensor) -> State:
        zero = torch.zeros_like(x0)
        return State(x0, zero, zero, Server.start(x0, self.server_optimizer))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        cohort = choose(fleet.clients, self.cohort_size, rng)
        cost, fold = replace(self.local.cost, vectors_up=2, exact_up=1), Mean(weights="uniform")
        r = fleet.ask(cohort, self.local_update, cost=cost, fold=fold, x=s.x, g=s.g, c=s.c)
        g = r["u"]
        c = s.c + len(r) / len(fleet.clients) * r["dc"]  # 1/N, not 1/S: c is the mean over all clients
        gamma = step_size(self.gamma, self.server_lr, self.local, r)
        server = s.server.step(g, gamma, self.local.num_trainable, self.server_optimizer, s.round)
        return State(server.point(self.server_optimizer), g, c, server, s.round + 1), {}

    def local_update(self, clients: Cohort, x: Tensor, g: Tensor, c: Tensor) -> Reply:
        c_i = clients.memory["c"]
        u = self.beta * (GRADIENT - c_i + c) + (1 - self.beta) * g
        local = self.local(clients, x, u, mean_grad=True)
        assert local.mean_grad is not None
        clients.memory["c"] = new = local.where_stepped(local.mean_grad, c_i)
        return {"u": along(clients, local, self.local.lr), "dc": Exact(Terms.of(new) - c_i)}
