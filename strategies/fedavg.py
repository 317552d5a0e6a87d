"""FedAvg: average the clients' local models.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas. Communication-Efficient Learning of Deep Networks from
Decentralized Data. arXiv:1602.05629, in the form with two step sizes (Reddi et al., arXiv:2003.00295): the server
steps along the mean of the pseudo-gradients; server_lr = 1 is plain model averaging.

Letters: P parameters; x the server's model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.aggregate import Mean, PreAggregator, prepared
from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.config import FromTable
from fedsim.fleet import Aggregator, Fleet, choose, linear
from fedsim.optim import Optimizer
from fedsim.strategies.checks import check_cohort
from fedsim.strategies.server import Server


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; server: the same and its optimizer's state; local: [S], mean of the clients'."""

    x: Tensor
    server: Server
    round: int = 0
    local: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Average local models over a uniformly drawn cohort.

    Args:
        cohort_size: clients in a round; null means every client.
        server_lr: step along the mean pseudo-gradient.
        aggregator: how updates become one; the mean weighs clients by their samples unless told otherwise.
        pre_aggregators: what prepares the updates for it, one after the other.
        server_optimizer: a rule of the optimizer core for the server's step.
        local: local training.
    """

    cohort_size: int | None = None
    server_lr: float = 1.0
    aggregator: Annotated[Aggregator, FromTable("aggregator", "mean")] = field(default_factory=Mean)
    pre_aggregators: Annotated[tuple[PreAggregator, ...] | None, FromTable("pre_aggregators")] = None
    server_optimizer: Annotated[Optimizer | None, FromTable("server_optimizer")] = None
    local: LocalTraining
    averages_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_cohort(self.cohort_size, self.server_lr)

    def init(self, x0: Tensor) -> State:
        return State(x0, Server.start(x0, self.server_optimizer), local=self.local.start(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        cohort = choose(fleet.clients, self.cohort_size, rng)
        cost, sent = self.local.cost, {"x": s.x}
        if s.local is not None:  # state_scope: server
            cost, sent = replace(cost, bits_up=32 * (len(s.x) + len(s.local))), {"x": s.x, "state": s.local}
        aggregator = prepared(self.pre_aggregators, self.aggregator, rng)
        r = fleet.ask(cohort, self.local_update, cost=cost, fold=linear(aggregator), **sent)
        delta = r.mean("delta", aggregator)
        local = None if s.local is None else s.local - r.mean("state", aggregator)
        server = s.server.step(delta, self.server_lr, self.local.num_trainable, self.server_optimizer, s.round)
        return State(server.point(self.server_optimizer), server, s.round + 1, local), {}

    def local_update(self, clients: Cohort, x: Tensor, state: Tensor | None = None) -> Reply:
        local = self.local(clients, x, state=state)
        return {"delta": local.delta} if local.state is None else {"delta": local.delta, "state": local.state}
