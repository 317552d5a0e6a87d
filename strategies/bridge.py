"""BRIDGE: decentralised gradient descent in which each client screens its neighbours' models by a robust rule.

Fang, Yang, Bajwa. BRIDGE: Byzantine-resilient decentralized gradient descent. arXiv:1908.08649. Its variants are
rules of the table: BRIDGE-T `trimmed_mean`, -M `median`, -K `krum`, -B `bulyan`; any other rule works as well. As in
the paper models are screened first, and the gradient is that at the client's model of before.

Letters: P parameters; w_i a client's model, g_i its gradient there, f byzantine vectors among those that it hears.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fedsim.aggregate import Aggregator, TooFewRows
from fedsim.aggregate.coordinatewise import TrimmedMean
from fedsim.cohort import Cohort
from fedsim.config import ConfigError, FromTable
from fedsim.graph import Graph, Inbox
from fedsim.strategies.peers import Peers
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class Bridge(Peers):
    """Each client takes its neighbours' models and its own through a robust rule, then a step; no server.

    Args:
        aggregator: the rule, of the vectors that a client hears, its own among them; each counts once.
    """

    aggregator: Annotated[Aggregator, FromTable("aggregator", {"name": "trimmed_mean", "f": 1})] = TrimmedMean(f=1)
    traits: ClassVar[Traits] = replace(
        Peers.traits,
        refused={key: why for key, why in Peers.traits.refused.items() if key != "aggregator"},
    )

    def check_graph(self, graph: Graph) -> None:
        for count in torch.unique(graph.counts).tolist():
            try:
                self.aggregator(torch.arange(count, dtype=torch.float32)[:, None], torch.ones(count))
            except ValueError as e:
                peer = int((graph.counts == count).nonzero()[0])
                raise ConfigError(
                    f"strategy.aggregator: does not fit the {count} vectors that peer {peer} hears, its own among "
                    f"them: {e}"
                ) from e

    def half_step(self, clients: Cohort, x0: Tensor | None) -> dict[str, Tensor]:
        w = self.model(clients, x0)
        clients.memory["g"] = self.gradient(clients, w)
        return {"w": w}

    def mix(self, clients: Cohort, inbox: Inbox) -> dict[str, Tensor]:
        y = self.combine(inbox["w"], inbox.heard)
        clients.memory["x"] = w = y - self.rate(clients) * clients.memory["g"]
        return {"x": w}

    def combine(self, v: Tensor, heard: Graph) -> Tensor:
        rows = [tuple(some.tolist()) for some in heard.peers.split(heard.counts.tolist())]
        made = {some: self.screened(v[list(some)]) for some in dict.fromkeys(rows)}  # on a complete graph one for all
        own = v[heard.own]
        return torch.stack([own[i] if (y := made[some]) is None else y for i, some in enumerate(rows)])

    def screened(self, v: Tensor) -> Tensor | None:
        """[P]: what the rule makes of the vectors [R, P] that a client heard; None if they are too few for it."""
        try:
            return self.aggregator(v, torch.ones(len(v), device=v.device))
        except TooFewRows:
            return None
