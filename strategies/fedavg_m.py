"""FedAvg-M: local steps along a mix of the fresh gradient and the server's momentum.

Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504,
algorithm 1; with partial participation this is FedCM (Xu et al., arXiv:2106.10874). g needs no momentum buffer of
its own: with x frozen it is the exponential moving average of the clients' gradients.

Departure: where clients take different numbers of steps, each one's change is divided by its own eta * K_i.

Letters: S clients in a round, K local steps, P parameters; x the server's model, g its momentum, eta the local step.
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
from fedsim.fleet import Fleet
from fedsim.strategies.momentum import Momentum
from fedsim.strategies.server import ServerState


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """g: [P], the mean direction of the last round's steps."""

    g: Tensor


@dataclass(frozen=True, kw_only=True)
class FedAvgM(Momentum):
    """FedAvg with momentum in the local steps; beta is the weight of the fresh gradient."""

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), g=torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x, g=s.g)
        g = r.mean("u", rule)
        return replace(self.step(s, g, self.step_size(fleet, r)), g=g), {}

    def local_update(self, clients: Cohort, x: Tensor, g: Tensor) -> Reply:
        return {"u": self.along(clients, self.local(clients, x, self.beta * GRADIENT + (1 - self.beta) * g))}
