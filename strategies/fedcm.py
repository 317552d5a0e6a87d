"""FedCM: local steps along a mix of the fresh gradient and the mean direction of the last round.

Xu, Wang, Wang, Yao. FedCM: Federated Learning with Client-level Momentum. arXiv:2106.10874, algorithm 2. It is FedAvg-M
(`fedavg_m`) under the names of its paper and with its server step. d is divided by the local step of the round that
produced it, so the local step may follow a schedule.

Departure: where clients take different numbers of steps, each one's change is divided by its own eta * K_i.

Letters: K local steps, P parameters; x the server's model, d the mean direction (the paper's Delta), eta the local
step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.direction import GRADIENT
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.momentum import Directed
from fedsim.strategies.server import ServerState
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """d: [P], the mean direction of the last round's steps."""

    d: Tensor


@dataclass(frozen=True, kw_only=True)
class FedCM(Directed):
    """FedAvg with client-level momentum.

    Args:
        alpha: weight of the fresh gradient, in (0, 1]; 1 is FedAvg.
    """

    alpha: float = 0.1
    traits: ClassVar[Traits] = Traits(local_rules="scheduled_sgd")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is the weight of the fresh gradient and must lie in (0, 1], got {self.alpha}")

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), d=torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x, d=s.d)
        d = r.mean("d", rule)
        return replace(self.step(s, d, self.parity(fleet, r)), d=d), {}

    def local_update(self, clients: Cohort, x: Tensor, d: Tensor) -> Reply:
        return {"d": self.along(clients, self.local(clients, x, self.alpha * GRADIENT + (1 - self.alpha) * d))}
