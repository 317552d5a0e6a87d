"""What serverless strategies share.

Letters: n clients, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet, Replies
from fedsim.strategies.server import NO_ROUNDS
from fedsim.strategy import Strategy, Traits

NO_SERVER = "peers average among themselves, and no server aggregates or steps"


@dataclass(frozen=True)
class State:
    """x: [P], the mean of the honest clients' models, for evaluation only; round: steps so far."""

    x: Tensor
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Peers(Strategy):
    """A strategy without a server: clients take a step of their own and mix their models.

    Args:
        local: gives the batch size and the learning rate (and its schedule).
    """

    local: LocalTraining
    traits: ClassVar[Traits] = Traits(
        local_rules="rate",
        bears_buffers=False,
        needs_all="every client mixes its model with all others' in every step",
        no_links="peers exchange whole vectors; links compress what goes to and from a server",
        refused=dict.fromkeys(
            ("cohort_size", "selection", "server_lr", "server_optimizer", "aggregator", "pre_aggregators"), NO_SERVER
        )
        | NO_ROUNDS,
    )

    def __post_init__(self) -> None:
        self.local.check(self.traits)

    @property
    def cost(self) -> Cost:
        """Of a step whose result stays with the client until it is exchanged."""
        return replace(self.local.cost, steps=1, vectors_up=0)

    def init(self, x0: Tensor) -> State:
        return State(x0)

    def rate(self, clients: Cohort) -> float:
        """The learning rate of this round, which every client knows from the experiment file."""
        return self.local.rate_at(int(clients.rounds[0]))


def honest_mean(fleet: Fleet, replies: Replies) -> tuple[Tensor, float]:
    """(mean [P] of the honest clients' models, mean squared distance to it)."""
    models = replies["x"]
    models = models[fleet.honest(replies.ids).to(models.device)]
    mean = models.mean(0)
    return mean, float((models - mean).square().sum(1).mean())
