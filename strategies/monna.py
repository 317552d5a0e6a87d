"""MoNNA: decentralised learning that survives byzantine peers, by momentum and nearest-neighbour averaging.

Farhadkhani, Guerraoui, Gupta, Hoang, Pinot, Stephan. Robust Collaborative Learning with Linear Gradient Overhead.
ICML 2023, arXiv:2209.10931, algorithm 1. What is mixed are models, after the local step. Each client starts from a
copy of the common model (the authors' code lets all first steps act on one shared tensor).

Letters: n clients, f of them byzantine at most, P parameters; theta_i a client's model, m_i its momentum,
h_i its model after the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.aggregate import nearest_neighbour_average
from fedsim.clients.local_training import LocalTraining
from fedsim.clients.oracle import gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Arrival, Fleet, Inbox
from fedsim.strategies.peers import honest_mean, local_rate


@dataclass(frozen=True)
class State:
    """x: [P], the mean of the honest clients' models, for evaluation only; round: steps so far."""

    x: Tensor
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Monna:
    """Polyak momentum, then the average of the nearest peers' models; no server.

    Args:
        beta: momentum, in [0, 1).
        f: byzantine clients to survive.
        arrival: all n vectors reach everybody, and n - f are averaged; adversarial, only n - f do, and n - 2f are.
        local: gives the batch size and the learning rate (and its schedule).
    """

    beta: float = 0.99
    f: int = 0
    arrival: Arrival = "all"
    local: LocalTraining
    single_step: ClassVar[bool] = True
    no_links: ClassVar[str] = "peers exchange whole vectors; links compress what goes to and from a server"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if self.f < 0:
            raise ValueError(f"f must not be negative, got {self.f}")
        local_rate("monna", self.local)

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        n = len(fleet.clients)
        keep = n - self.f if self.arrival == "all" else n - 2 * self.f
        if keep < 1 or 2 * self.f >= n:
            raise ValueError(f"strategy.f={self.f} is too large for {n} clients: fewer than half may be byzantine")
        lr = local_rate("monna", self.local, s.round)
        cost, x0 = replace(self.local.cost, steps=1, vectors_up=0), s.x if s.round == 0 else None
        half = fleet.ask(fleet.clients, self.half_step, cost=cost, lr=lr, x0=x0)
        out = fleet.exchange(half, self.mix, arrival=self.arrival, missing=self.f, keep=keep)
        x, spread = honest_mean(fleet, out)
        return State(x, s.round + 1), {"honest_spread": spread}

    def half_step(self, clients: Cohort, lr: float, x0: Tensor | None) -> dict[str, Tensor]:
        theta = clients.memory["x"] if x0 is None else x0.expand(len(clients), -1)
        (g,) = gradient(clients, theta, batch_size=self.local.schedule.batch_size)
        clients.memory["m"] = m = self.beta * clients.memory["m"] + (1 - self.beta) * g
        return {"h": theta - lr * m}

    def mix(self, clients: Cohort, inbox: Inbox, keep: int) -> dict[str, Tensor]:
        own = inbox["h"][inbox.own]
        clients.memory["x"] = theta = nearest_neighbour_average(own, inbox["h"], inbox.heard, keep=keep)
        return {"x": theta}
