"""MoNNA: decentralised learning that survives byzantine peers, by momentum and nearest-neighbour averaging.

Farhadkhani, Guerraoui, Gupta, Hoang, Pinot, Stephan. Robust Collaborative Learning with Linear Gradient Overhead.
ICML 2023, arXiv:2209.10931, algorithm 1. What is mixed are models, after the local step. Each client starts from a
copy of the common model (the authors' code lets all first steps act on one shared tensor).
The paper's graph is complete; on another one each client does the same among those that it hears.

Letters: n clients, f of them byzantine at most, P parameters; theta_i a client's model, h_i its model after the step
along its momentum m_i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim.aggregate import nearest_neighbour_average
from fedsim.config import ConfigError
from fedsim.fleet import Fleet, Replies
from fedsim.graph import Graph
from fedsim.strategies.peers import MomentumPeers
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class Monna(MomentumPeers):
    """Polyak momentum, then the average of the nearest peers' models; no server.

    Args:
        f: byzantine clients to survive among those that a client hears, itself among them; n is their number.
        arrival: all n vectors arrive, and n - f are averaged; adversarial, only n - f do, and n - 2f are.
    """

    traits: ClassVar[Traits] = replace(
        MomentumPeers.traits, needs_all="every client waits for nearly all of its neighbours in every step"
    )
    beta: float = 0.99
    arrival: Literal["all", "adversarial"] = "all"

    def check_graph(self, graph: Graph) -> None:
        peer, fewest = int(graph.counts.argmin()), int(graph.counts.min())
        if 2 * self.f >= fewest:
            raise ConfigError(
                f"strategy.f: {self.f} is too large for peer {peer}, which hears {fewest} vectors, "
                "its own among them: fewer than half may be byzantine; lower f, or take a topology with more links"
            )

    def exchange(self, fleet: Fleet, half: Replies) -> Replies:
        missing = self.f if self.arrival == "adversarial" else 0
        return fleet.exchange(half, self.mix, graph=fleet.graph(self.topology), missing=missing)

    def combine(self, v: Tensor, heard: Graph) -> Tensor:
        n = heard.counts + heard.lost
        keep = n - (self.f if self.arrival == "all" else 2 * self.f)
        keep = torch.where(n > 2 * self.f, keep, 1)  # on a graph drawn anew, who hears too few keeps its own
        return nearest_neighbour_average(v[heard.own], v, heard, keep)
