"""Gradient tracking: decentralised SGD along an estimate of everybody's gradient, which clients mix as well.

Di Lorenzo, Scutari. NEXT: In-network nonconvex optimization. arXiv:1602.00591; Nedić, Olshevsky, Shi (DIGing).
arXiv:1607.03218. This is the order "adapt, then combine", in which y too is mixed; DIGing mixes x before the step.
With full gradients on a fixed graph peers reach the common optimum, however different their data are. The sum of all
y_i is the sum of everybody's last gradients, which needs weights that keep sums, as Metropolis' do.

Letters: P parameters; x_i a client's model, g_i its last gradient, y_i its tracker, W_ij the mixing weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.config import ConfigError
from fedsim.graph import Graph, Inbox
from fedsim.strategies.peers import Peers


@dataclass(frozen=True, kw_only=True)
class GradientTracking(Peers):
    """One step along the tracked gradient of all, then weighted averages of models and trackers; no server."""

    def check_graph(self, graph: Graph) -> None:
        heard = torch.zeros(len(graph), dtype=torch.float64).index_add_(0, graph.peers, graph.weights)
        peer = int((heard - 1).abs().argmax())
        if abs(float(heard[peer]) - 1) > 1e-9:
            raise ConfigError(
                f"strategy.topology: gradient tracking needs weights that keep sums, and what peer {peer} sends counts "
                f"{float(heard[peer]):.4g} times in all; take mixing: metropolis"
            )

    def half_step(self, clients: Cohort, x0: Tensor | None) -> dict[str, Tensor]:
        x = self.model(clients, x0)
        g = self.gradient(clients, x)
        y = clients.memory["y"] + g - clients.memory["g"]
        clients.memory["g"] = g
        return {"h": x - self.rate(clients) * y, "y": y}

    def mix(self, clients: Cohort, inbox: Inbox) -> dict[str, Tensor]:
        clients.memory["y"] = inbox.mix("y")
        return super().mix(clients, inbox)

    def combine(self, v: Tensor, heard: Graph) -> Tensor:
        return heard.mix(v)
