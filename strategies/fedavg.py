"""FedAvg: average the clients' local models.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas. Communication-Efficient Learning of Deep Networks from
Decentralized Data. arXiv:1602.05629, in the form with two step sizes (Reddi et al., arXiv:2003.00295): the server
steps along the mean of the pseudo-gradients; server_lr = 1 is plain model averaging.

Letters: P parameters; x the server's model.
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
from fedsim.strategies.server import Rule, ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """local: [E], the mean of the clients' optimizer states, if the server is to send it (state_scope: server)."""

    local: Tensor | None


@dataclass(frozen=True, kw_only=True)
class FedAvg(Synchronous):
    """Average the local models of a cohort.

    Args:
        aggregator: how updates become one; the mean weighs clients by their samples unless told otherwise.
    """

    aggregator: Rule = Mean()
    traits: ClassVar[Traits] = Traits(averages_state=True, bears_weights=True)

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), local=self.local.start(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        rule, cost, sent = self.rule(rng, s.last), self.local.cost, {"x": s.x}
        if s.local is not None:
            cost, sent = replace(cost, bits_up=32 * (len(s.x) + len(s.local))), {"x": s.x, "state": s.local}
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, cost=cost, **sent)
        s = self.step(s, r.mean("delta", rule))
        return s if s.local is None else replace(s, local=s.local - r.mean("state", self.rule(rng))), {}

    def local_update(self, clients: Cohort, x: Tensor, state: Tensor | None = None) -> Reply:
        local = self.local(clients, x, state=state)
        return {"delta": local.delta} if local.state is None else {"delta": local.delta, "state": local.state}
