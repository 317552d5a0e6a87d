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
from fedsim.clients.oracle import gradient_sum
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.server import EVERYBODY, Rule, ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class Centralised(Synchronous):
    """Minibatch SGD over all clients' data: one step a round along the mean gradient.

    Args:
        aggregator: how gradients become one; by default p_i is the share of samples.
        local: gives the batch size that a client adds to a step, and the rate with its schedule.
    """

    aggregator: Rule = Mean()
    traits: ClassVar[Traits] = Traits(
        local_rules="rate",
        bears_buffers=False,
        refused=dict.fromkeys(
            EVERYBODY, "one machine has all data; fedavg with local.steps: 1 takes a part of the clients"
        ),
    )

    @property
    def cost(self) -> Cost:
        return replace(self.local.cost, steps=1)

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.gradient, rule=rule, x=s.x)
        return self.step(s, r.mean("gradient", rule), self.server_lr * self.local.rate_at(fleet.round)), {}

    def gradient(self, clients: Cohort, x: Tensor) -> Reply:
        total, loss, _ = gradient_sum(clients, x, replace(self.local.schedule, epochs=None, steps=1))
        clients.log(train_loss=loss)
        return {"gradient": total}
