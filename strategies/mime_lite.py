"""MimeLite: local steps by the server's optimizer, whose state is fixed during a round.

Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh. Mime: Mimicking Centralized Stochastic Algorithms in Federated
Learning. arXiv:2008.03606, algorithm 1 without the correction of local gradients; which optimizers, and how, says
`fedsim.strategies.statistics`. Clients send their full gradients at x beside their changes, in one message.

Letters: S clients in a round, P parameters; x the server's model, s its optimizer state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.clients.local_training import Reply
from fedsim.clients.oracle import full_gradient_in_terms
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.statistics import Mimicking, State, full_pass


@dataclass(frozen=True, kw_only=True)
class MimeLite(Mimicking):
    """Local steps by an optimizer whose state is the server's."""

    @property
    def cost(self) -> Cost:
        """Of the local steps, and of a pass over all data."""
        steps, full = self.local.cost.steps_of, full_pass(self.local).steps_of
        return Cost(steps=lambda num_examples: steps(num_examples) + full(num_examples), vectors_up=2)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule, x = self.rule(rng, s.last), s.x
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=x, s=s.sent)
        s = self.learned(s, fleet, x, r.mean("gradient", self.rule(rng, s.c)))
        return self.step(s, r.mean("delta", rule)), {}

    def local_update(self, clients: Cohort, x: Tensor, s: Tensor | None) -> Reply:
        return {"delta": self.local(clients, x, fixed=s).delta, "gradient": full_gradient_in_terms(clients, x)}
