"""FedAvg: average the clients' local models.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas. Communication-Efficient Learning of Deep Networks from
Decentralized Data. arXiv:1602.05629, in the form with two step sizes (Reddi et al., arXiv:2003.00295): the server
steps along the mean of the pseudo-gradients; server_lr = 1 is plain model averaging.

Letters: S clients of a cohort, P parameters; x the server's model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from clients.local_sgd import LocalSGD
from fedsim.aggregate import Mean
from fedsim.cohort import Cohort
from fedsim.config import FromTable
from fedsim.fleet import Aggregator, Fleet, choose, linear


@dataclass(frozen=True)
class State:
    """x: [P], the server's model."""

    x: Tensor


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Average local models over a uniformly drawn cohort.

    Args:
        cohort_size: S; None means every client.
        server_lr: step along the mean pseudo-gradient.
        aggregator: how updates are averaged; weights are the clients' sample counts unless it says otherwise.
        local: local training.
    """

    cohort_size: int | None = None
    server_lr: float = 1.0
    aggregator: Annotated[Aggregator, FromTable("aggregator")] = field(default_factory=Mean)
    local: LocalSGD

    def __post_init__(self) -> None:
        if self.cohort_size is not None and self.cohort_size < 1:
            raise ValueError(f"strategy.cohort_size must be at least 1, got {self.cohort_size}")
        if not self.server_lr > 0:
            raise ValueError(f"strategy.server_lr must be positive, got {self.server_lr}")

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        cohort = choose(fleet.clients, self.cohort_size, rng)
        r = fleet.ask(cohort, self.local_update, cost=self.local.cost, fold=linear(self.aggregator), x=s.x)
        return State(s.x - self.server_lr * r.mean("delta", self.aggregator)), {}

    def local_update(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {"delta": self.local(clients, x).delta}
