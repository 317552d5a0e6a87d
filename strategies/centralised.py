"""Centralised SGD: what one machine that had everybody's data would do, as a case of the framework.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189: one local step, everybody waits for everybody, and d_i = p_i. It is FedAvg with
local.steps: 1, whose server may step by any rule along the gradient itself.

Letters: N clients, P parameters; x the model, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.descent import Descent
from fedsim.strategies.server import EVERYBODY, Rule, ServerState
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class Centralised(Descent):
    """Minibatch SGD over all clients' data: one step a round along the mean gradient.

    Args:
        aggregator: how gradients become one; by default p_i is the share of samples.
    """

    aggregator: Rule = Mean()
    traits: ClassVar[Traits] = replace(
        Descent.traits,
        refused=dict.fromkeys(
            EVERYBODY, "one machine has all data; fedavg with local.steps: 1 takes a part of the clients"
        ),
    )

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.gradient, rule=rule, x=s.x)
        return self.descend(s, fleet, r.mean("gradient", rule)), {}

    def gradient(self, clients: Cohort, x: Tensor) -> Reply:
        return {"gradient": self.gradient_at(clients, x)}
