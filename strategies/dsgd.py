"""Decentralised SGD on a complete graph: a local step, then the average of all peers' models.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu. Can Decentralized Algorithms Outperform Centralized Algorithms?
arXiv:1705.09056, with uniform mixing weights. It is MoNNA with f = 0 and beta = 0.

Letters: n clients, P parameters; theta_i a client's model, h_i its model after the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.clients.oracle import gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, Inbox
from fedsim.strategies.peers import Peers, State, honest_mean


@dataclass(frozen=True, kw_only=True)
class DSGD(Peers):
    """One local step, then the plain average over all peers; no server."""

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        half = fleet.ask(fleet.clients, self.half_step, cost=self.cost, x0=None if s.round else s.x)
        out = fleet.exchange(half, self.mix)
        x, spread = honest_mean(fleet, out)
        return State(x, s.round + 1), {"honest_spread": spread}

    def half_step(self, clients: Cohort, x0: Tensor | None) -> dict[str, Tensor]:
        theta = clients.memory["x"] if x0 is None else x0.expand(len(clients), -1)
        (g,) = gradient(clients, theta, batch_size=self.local.schedule.batch_size)
        return {"h": theta - self.rate(clients) * g}

    def mix(self, clients: Cohort, inbox: Inbox) -> dict[str, Tensor]:
        heard = inbox.heard.to(inbox["h"])
        clients.memory["x"] = theta = heard @ inbox["h"] / heard.sum(1, keepdim=True)
        return {"x": theta}
