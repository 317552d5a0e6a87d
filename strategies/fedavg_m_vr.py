"""FedAvg-M-VR: FedAvg-M with a STORM-type correction, the same minibatch at two points.

Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504,
algorithm 3. g may start at zero, or at the mean minibatch gradient at x^0.

Letters: S clients in a round, K local steps, P parameters; x the server's model, x_prev the one before it,
g its momentum, eta the local step.
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
from fedsim.strategies.momentum import NO_LATE, Momentum, twice
from fedsim.strategies.server import ServerState
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """x_prev: [P], the model before x; g: [P], momentum."""

    x_prev: Tensor
    g: Tensor


@dataclass(frozen=True, kw_only=True)
class FedAvgMVR(Momentum):
    """FedAvg-M with variance reduction: two gradients of one minibatch in every local step."""

    traits: ClassVar[Traits] = Traits(local_rules="plain_sgd", two_points=True, no_late=NO_LATE)

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), x_prev=x0, g=torch.zeros_like(x0))

    @property
    def cost(self) -> Cost:
        return twice(self.local)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x, x_prev=s.x_prev, g=s.g)
        g = r.mean("u", rule)
        return replace(self.step(s, g, self.step_size(fleet, r)), x_prev=s.x, g=g), {}

    def local_update(self, clients: Cohort, x: Tensor, x_prev: Tensor, g: Tensor) -> Reply:
        u = GRADIENT + (1 - self.beta) * (g - gradient_at(x_prev))
        return {"u": self.along(clients, self.local(clients, x, u))}
