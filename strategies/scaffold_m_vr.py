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

from fedsim.clients.direction import GRADIENT, gradient_at
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.control import followed, report
from fedsim.strategies.momentum import NO_LATE, Momentum, twice
from fedsim.strategies.server import ServerState
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """x_prev: [P], the model before x; g: [P], momentum; c: [P], mean control variate."""

    x_prev: Tensor
    g: Tensor
    c: Tensor


@dataclass(frozen=True, kw_only=True)
class ScaffoldMVR(Momentum):
    """SCAFFOLD-M with variance reduction: two gradients of one minibatch in every local step."""

    traits: ClassVar[Traits] = Traits(local_rules="plain_sgd", two_points=True, no_late=NO_LATE)

    def init(self, x0: Tensor) -> State:
        zero = torch.zeros_like(x0)
        return State(x0, self.optimizer_state(x0), x_prev=x0, g=zero, c=zero)

    @property
    def cost(self) -> Cost:
        return replace(twice(self.local), vectors_up=2, exact_up=1)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x, x_prev=s.x_prev, g=s.g, c=s.c)
        g = r.mean("u", rule)
        c = followed(s.c, r, self.rule(rng, s.c), len(fleet.clients))
        return replace(self.step(s, g, self.step_size(fleet, r)), x_prev=s.x, g=g, c=c), {}

    def local_update(self, clients: Cohort, x: Tensor, x_prev: Tensor, g: Tensor, c: Tensor) -> Reply:
        c_i = clients.memory["c"]
        u = GRADIENT - self.beta * (c_i - c) + (1 - self.beta) * (g - gradient_at(x_prev))
        local = self.local(clients, x, u, mean_grad=True)
        assert local.mean_grad is not None
        clients.memory["c"] = new = local.where_stepped(local.mean_grad, c_i)
        return {"u": self.along(clients, local), "c": report(self, new, c_i)}
