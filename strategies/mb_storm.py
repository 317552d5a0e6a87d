"""MB-STORM: STORM on one machine, whose minibatch is all that S clients would use in a round; no local drift.

The baseline of Cheng, Huang, Wu, Yuan, arXiv:2306.16504, after Patel, Wang, Woodworth, Bullins, Srebro. Towards Optimal
Communication Complexity in Distributed Non-Convex Optimization. NeurIPS 2022. [memory; consequences checked by the
tests]

    g <- G(x) + (1 - beta) * (g - G(x_prev)),   x <- x - gamma * g,   G the mean of S K gradients, on the same samples

Letters: S clients in a round, K minibatches of each, P parameters; x the server's model, x_prev the one before it, g
the estimate of the gradient, eta the local step, which gives gamma its default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.local_training import Reply
from fedsim.clients.oracle import gradient_sum
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.momentum import NO_LATE, Momentum, twice
from fedsim.strategies.server import ServerState
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """x_prev: [P], the model before x; g: [P], the estimate that took it there."""

    x_prev: Tensor
    g: Tensor


@dataclass(frozen=True, kw_only=True)
class MBStorm(Momentum):
    """STORM with one large minibatch a round; beta is the weight of the fresh gradient."""

    traits: ClassVar[Traits] = Traits(local_rules="plain_sgd", bears_buffers=False, no_late=NO_LATE)

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), x_prev=x0, g=torch.zeros_like(x0))

    @property
    def cost(self) -> Cost:
        return twice(self.local)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule, x = self.rule(rng, s.last), s.x
        s, r = self.ask(s, fleet, rng, self.gradients, rule=rule, x=x, x_prev=s.x_prev)
        g = r.mean("u", rule) + (1 - self.beta) * s.g
        return replace(self.step(s, g, self.step_size(fleet, r)), x_prev=x, g=g), {}

    def gradients(self, clients: Cohort, x: Tensor, x_prev: Tensor) -> Reply:
        here, losses, steps = gradient_sum(clients, x, self.local.schedule)
        there, _, _ = gradient_sum(clients, x_prev, self.local.schedule)
        clients.log(train_loss=losses / steps.clamp(min=1))
        return {"u": (here - (1 - self.beta) * there) * (1 / steps.clamp(min=1).double())}
