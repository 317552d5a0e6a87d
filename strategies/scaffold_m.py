"""SCAFFOLD-M: control variates and momentum in the local steps.

Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504,
algorithm 2. c_i is the mean of the raw gradients h, not of the mixed directions.

Letters: N clients, S of them in a round, K local steps, P parameters; x the server's model, g its momentum,
c the mean of the control variates c_i, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.direction import GRADIENT
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.control import followed, report
from fedsim.strategies.momentum import Momentum
from fedsim.strategies.server import ServerState


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """g: [P], momentum; c: [P], mean control variate."""

    g: Tensor
    c: Tensor


@dataclass(frozen=True, kw_only=True)
class ScaffoldM(Momentum):
    """SCAFFOLD with momentum in the local steps; beta is the weight of the fresh gradient."""

    def init(self, x0: Tensor) -> State:
        zero = torch.zeros_like(x0)
        return State(x0, self.optimizer_state(x0), g=zero, c=zero)

    @property
    def cost(self) -> Cost:
        return replace(self.local.cost, vectors_up=2, exact_up=1)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x, g=s.g, c=s.c)
        g = r.mean("u", rule)
        c = followed(s.c, r, self.rule(rng, s.c), len(fleet.clients))
        return replace(self.step(s, g, self.step_size(fleet, r)), g=g, c=c), {}

    def local_update(self, clients: Cohort, x: Tensor, g: Tensor, c: Tensor) -> Reply:
        c_i = clients.memory["c"]
        u = self.beta * (GRADIENT - c_i + c) + (1 - self.beta) * g
        local = self.local(clients, x, u, mean_grad=True)
        assert local.mean_grad is not None
        clients.memory["c"] = new = local.where_stepped(local.mean_grad, c_i)
        return {"u": self.along(clients, local), "c": report(self, new, c_i)}
