"""Mime: local steps by the server's optimizer, whose state is fixed during a round, corrected by the mean gradient.

Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh. Mime: Mimicking Centralized Stochastic Algorithms in Federated
Learning. arXiv:2008.03606, algorithm 1; which optimizers, and how, says `fedsim.strategies.statistics`. Clients hold
nothing between rounds. Within a round they hold x from the first message, which asks for the full gradient, to the
second, which brings its mean. [memory; the same minibatch at y and x, V at x and the counts of vectors also in the
authors' code; consequences checked by the tests]

Letters: S clients in a round, K local steps, P parameters; x the server's model, y a local one, s the server's
optimizer state, c the mean of the clients' full gradients at x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.clients.direction import GRADIENT, gradient_at
from fedsim.clients.local_training import Reply
from fedsim.clients.oracle import full_gradient_in_terms
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet, Held
from fedsim.strategies.momentum import twice
from fedsim.strategies.statistics import Mimicking, State, full_pass


@dataclass(frozen=True, kw_only=True)
class Mime(Mimicking):
    """Local steps by an optimizer whose state is the server's, along gradients corrected to the global one."""

    @property
    def cost(self) -> Cost:
        """Of the first message's job: it alone has a deadline."""
        return full_pass(self.local)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule = self.rule(rng, s.c)
        s, r = self.begin(s, fleet, rng, self.full_gradient, rule=rule, cost=self.cost, x=s.x)
        x, c, rule, cost = s.x, r.mean("gradient", rule), self.rule(rng, s.last), twice(self.local)
        s, r = self.go_on(s, fleet, r, self.local_update, rule=rule, cost=cost, x=Held(x), c=c, s=s.sent)
        return self.step(self.learned(s, fleet, x, c), r.mean("delta", rule)), {}

    def full_gradient(self, clients: Cohort, x: Tensor) -> Reply:
        return {"gradient": full_gradient_in_terms(clients, x)}

    def local_update(self, clients: Cohort, x: Tensor, c: Tensor, s: Tensor | None) -> Reply:
        return {"delta": self.local(clients, x, GRADIENT - gradient_at(x) + c, fixed=s).delta}
