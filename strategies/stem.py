"""STEM: local steps along a momentum that every client renews by STORM, averaged with the models.

Khanduri, Sharma, Yang, Hong, Liu, Rajawat, Varshney. STEM: A Stochastic Two-Sided Momentum Algorithm Achieving
Near-Optimal Sample and Communication Complexities for Federated Learning. arXiv:2106.10435, algorithm 1. [memory; that
one step a round is STORM on one machine, and that clients of equal curvature follow it for any K, is checked by the
tests]

    x_i <- x_i - eta * d_i;   d_i <- gradF_i(x_i; xi) + (1 - a) * (d_i - gradF_i(x_i before; xi));   every K steps both
    x_i and d_i are averaged; d_0 is the mean gradient at x_0.

So clients hold nothing between rounds. Departures: the rate and a (in the paper c * eta^2) are constant, and the first
gradient is over all data instead of a large batch.

Letters: K local steps, P parameters; x the server's model, d the mean of the momenta d_i, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.local_training import Reply
from fedsim.clients.oracle import full_gradient_in_terms
from fedsim.clients.recursive import recursive_run
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, Held
from fedsim.strategies.momentum import NO_LATE, twice
from fedsim.strategies.server import EVERYBODY, ServerState, Synchronous
from fedsim.strategies.statistics import full_pass
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """d: [P], the mean momentum at x."""

    d: Tensor


@dataclass(frozen=True, kw_only=True)
class Stem(Synchronous):
    """Local steps along STORM's estimate of the gradient; models and estimates are averaged.

    Args:
        a: weight of the fresh gradient in the estimate, in [0, 1]; 1 leaves local SGD, one step late.
    """

    a: float = 0.1
    traits: ClassVar[Traits] = Traits(
        local_rules="plain_sgd",
        two_points=True,
        no_late=NO_LATE,
        refused=dict.fromkeys(
            EVERYBODY, "every client takes part, since the momentum is that of all; lower clients.count"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.a <= 1:
            raise ValueError(f"a is the weight of the fresh gradient and must lie in [0, 1], got {self.a}")

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), d=torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule, x, cost = self.rule(rng, s.last), s.x, replace(twice(self.local), vectors_up=2)
        if s.round:
            s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, cost=cost, x=x, d=s.d)
        else:
            s, r = self.begin(s, fleet, rng, self.start, rule=rule, cost=full_pass(self.local), x=x)
            s = replace(s, d=r.mean("gradient", rule))
            s, r = self.go_on(s, fleet, r, self.local_update, rule=rule, cost=cost, x=Held(x), d=s.d)
        d = s.d + r.mean("d", self.rule(rng))
        return replace(self.step(s, r.mean("delta", rule)), d=d), {}

    def start(self, clients: Cohort, x: Tensor) -> Reply:
        return {"gradient": full_gradient_in_terms(clients, x)}

    def local_update(self, clients: Cohort, x: Tensor, d: Tensor) -> Reply:
        y, d_i, losses, steps = recursive_run(clients, x, d, self.local.schedule, self.local.lr, self.a)
        clients.log(train_loss=losses / steps.clamp(min=1))
        return {"delta": x - y, "d": d_i - d}
