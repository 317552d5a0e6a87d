"""ClippedGossip: averaging on any graph in which what lies too far from a client's own model is cut to a radius.

He, Karimireddy, Jaggi. Byzantine-robust decentralized learning via ClippedGossip (self-centred clipping).
arXiv:2202.01545, with local momentum. The radius of their theorem is tau_i^2 = sum_j W_ij |h_i - h_j|^2 / delta_i over
the honest neighbours j, delta_i the weight of the byzantine ones. Who these are is not known: here the f farthest are
left out of the sum, and delta_i is what the f heaviest neighbours weigh. With f = 0 nothing is clipped.

Letters: P parameters; theta_i a client's model, h_i its model after the step along its momentum m_i, W_ij the mixing
weights, f byzantine neighbours of a client at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from fedsim.aggregate.distances import FAR, distances_along
from fedsim.config import ConfigError
from fedsim.graph import Graph
from fedsim.strategies.peers import MomentumPeers


@dataclass(frozen=True, kw_only=True)
class ClippedGossip(MomentumPeers):
    """Polyak momentum, then gossip in which each neighbour's difference to one's own model is clipped; no server.

    Args:
        f: byzantine neighbours to survive, fewer than any client has.
        tau: radius to clip to, a length; null takes that of the theory, from f.
    """

    tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not self.tau > 0:
            raise ValueError(f"tau must be a positive length or null, got {self.tau}")

    def check_graph(self, graph: Graph) -> None:
        peer, fewest = int(graph.counts.argmin()), int(graph.counts.min()) - 1
        if 0 < self.f >= fewest:
            raise ConfigError(
                f"strategy.f: {self.f} is too large for peer {peer}, which has {fewest} "
                "neighbours: one at least must be honest; lower f, or take a topology with more links"
            )

    def combine(self, v: Tensor, heard: Graph) -> Tensor:
        distances = distances_along(heard, v[heard.own], v)
        return clipped(heard, distances, self.radii(heard, distances)).mix(v)

    def radii(self, heard: Graph, distances: Tensor) -> Tensor:
        """[C] float64: tau_i of C clients, from the squared distances [E] of what they heard."""
        if self.tau is not None:
            return heard.weights.new_full((len(heard),), self.tau)
        trusted = heard.ranks(distances) < (heard.counts - self.f)[heard.hearers]
        heaviest = (heard.ranks(-heard.weights.masked_fill(heard.is_own, -1.0)) < self.f) & ~heard.is_own
        spread = heard.sums((heard.weights * distances).where(trusted, 0.0))
        delta = heard.sums(heard.weights.where(heaviest, 0.0))
        return torch.where(delta > 0, (spread / delta).sqrt(), inf)


def clipped(heard: Graph, distances: Tensor, tau: Tensor) -> Graph:
    """The weights W_ij min(1, tau_i / |h_i - h_j|) of h_i + sum_j W_ij clip(h_j - h_i); the rest is h_i's own.

    Args:
        heard: by C clients, E vectors.
        distances: [E] float64, squared, from each client's own.
        tau: [C] float64.
    """
    share = (tau[heard.hearers] / distances.sqrt().clamp(min=1e-300)).clamp(max=1.0).where(distances < FAR, 0.0)
    kept = (heard.weights * share).masked_fill(heard.is_own, 0.0)
    rest = 1.0 - heard.sums(kept)
    return replace(heard, weights=torch.where(heard.is_own, rest[heard.hearers], kept)).chosen(
        (share > 0) | heard.is_own
    )
