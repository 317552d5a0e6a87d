"""MoNNA: decentralised learning that survives byzantine peers, by momentum and nearest-neighbour averaging.

Farhadkhani, Guerraoui, Gupta, Hoang, Pinot, Stephan. Robust Collaborative Learning with Linear Gradient Overhead.
ICML 2023, arXiv:2209.10931, algorithm 1. What is mixed are models, after the local step. Each client starts from a
copy of the common model (the authors' code lets all first steps act on one shared tensor).

Letters: n clients, f of them byzantine at most, P parameters; theta_i a client's model, m_i its momentum,
h_i its model after the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.aggregate import nearest_neighbour_average
from fedsim.clients.oracle import gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Arrival, Fleet, Inbox
from fedsim.strategies.peers import Peers, State, honest_mean


@dataclass(frozen=True, kw_only=True)
class Monna(Peers):
    """Polyak momentum, then the average of the nearest peers' models; no server.

    Args:
        beta: momentum, in [0, 1).
        f: byzantine clients to survive.
        arrival: all n vectors reach everybody, and n - f are averaged; adversarial, only n - f do, and n - 2f are.
    """

    beta: float = 0.99
    f: int = 0
    arrival: Arrival = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if self.f < 0:
            raise ValueError(f"f must not be negative, got {self.f}")

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        if 2 * self.f >= (n := len(fleet.clients)):
            raise ValueError(f"strategy.f={self.f} is too large for {n} clients: fewer than half may be byzantine")
        half = fleet.ask(fleet.clients, self.half_step, cost=self.cost, x0=None if s.round else s.x)
        out = fleet.exchange(half, self.mix, arrival=self.arrival, missing=self.f)
        x, spread = honest_mean(fleet, out)
        return State(x, s.round + 1), {"honest_spread": spread}

    def half_step(self, clients: Cohort, x0: Tensor | None) -> dict[str, Tensor]:
        theta = clients.memory["x"] if x0 is None else x0.expand(len(clients), -1)
        (g,) = gradient(clients, theta, batch_size=self.local.schedule.batch_size)
        clients.memory["m"] = m = self.beta * clients.memory["m"] + (1 - self.beta) * g
        return {"h": theta - self.rate(clients) * m}

    def mix(self, clients: Cohort, inbox: Inbox) -> dict[str, Tensor]:
        own, n = inbox["h"][inbox.own], len(clients.task.num_examples)
        keep = n - self.f if self.arrival == "all" else n - 2 * self.f
        clients.memory["x"] = theta = nearest_neighbour_average(own, inbox["h"], inbox.heard, keep=keep)
        return {"x": theta}
