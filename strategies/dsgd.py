"""Decentralised SGD: a local step, then the weighted average of the neighbours' models.

Lian, Zhang, Zhang, Hsieh, Zhang, Liu. Can Decentralized Algorithms Outperform Centralized Algorithms?
arXiv:1705.09056, in the order "adapt, then combine". On a complete graph it is MoNNA with f = 0 and beta = 0.

Letters: P parameters; theta_i a client's model, h_i its model after the local step, W_ij the mixing weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.graph import Graph
from fedsim.strategies.peers import Peers


@dataclass(frozen=True, kw_only=True)
class DSGD(Peers):
    """One local step, then the weighted average over the neighbours; no server."""

    def half_step(self, clients: Cohort, x0: Tensor | None) -> dict[str, Tensor]:
        theta = self.model(clients, x0)
        return {"h": theta - self.rate(clients) * self.gradient(clients, theta)}

    def combine(self, v: Tensor, heard: Graph) -> Tensor:
        return heard.mix(v)
