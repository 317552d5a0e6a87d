"""Decentralised SGD on a complete graph: a local step, then the average of all peers' models.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu. Can Decentralized Algorithms Outperform Centralized Algorithms?
arXiv:1705.09056, with uniform mixing weights. It is MoNNA with f = 0 and beta = 0.

Letters: n clients, P parameters; theta_i a client's model, h_i its model after the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.clients.oracle import gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, Inbox
from fedsim.strategies.peers import honest_mean, local_rate


@dataclass(frozen=True)
class State:
    """x: [P], the mean of the honest clients' models, for evaluation only; round: steps so far."""

    x: Tensor
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class DSGD:
    """One local step, then the plain average over all peers; no server.

    Args:
        local: gives the batch size and the learning rate (and its schedule).
    """

    local: LocalTraining
    single_step: ClassVar[bool] = True
    no_links: ClassVar[str] = "peers exchange whole vectors; links compress what goes to and from a server"

    def __post_init__(self) -> None:
        local_rate("dsgd", self.local)

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        lr = local_rate("dsgd", self.local, s.round)
        cost, x0 = replace(self.local.cost, steps=1, vectors_up=0), s.x if s.round == 0 else None
        half = fleet.ask(fleet.clients, self.half_step, cost=cost, lr=lr, x0=x0)
        out = fleet.exchange(half, self.mix)
        x, spread = honest_mean(fleet, out)
        return State(x, s.round + 1), {"honest_spread": spread}

    def half_step(self, clients: Cohort, lr: float, x0: Tensor | None) -> dict[str, Tensor]:
        theta = clients.memory["x"] if x0 is None else x0.expand(len(clients), -1)
        (g,) = gradient(clients, theta, batch_size=self.local.schedule.batch_size)
        return {"h": theta - lr * g}

    def mix(self, clients: Cohort, inbox: Inbox) -> dict[str, Tensor]:
        heard = inbox.heard.to(inbox["h"])
        clients.memory["x"] = theta = heard @ inbox["h"] / heard.sum(1, keepdim=True)
        return {"x": theta}
