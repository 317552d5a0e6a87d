"""What serverless strategies share: every client takes a half step, then mixes its vectors with its neighbours'.

Which clients are neighbours is `topology`, a field of these strategies as a cohort's `selection` is of those with a
server.

Letters: n clients, P parameters.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate.base import numbers_at_once
from fedsim.clients.local_training import LocalTraining
from fedsim.clients.oracle import gradient
from fedsim.cohort import Cohort
from fedsim.config import FromTable, at
from fedsim.fleet import Cost, Fleet, Replies, TooFewRows
from fedsim.graph import Graph, Inbox, Topology
from fedsim.strategies.server import NO_ROUNDS
from fedsim.strategy import Mix, Strategy, Traits
from fedsim.topology import Complete

NO_SERVER = "peers average among themselves, and no server aggregates or steps"


@dataclass(frozen=True)
class State:
    """What is known of all peers.

    Args:
        x: [P], the mean of the honest clients' models, for evaluation only.
        round: steps so far.
        x0: [P], where those begin that have not been there yet; None once all have.
        joined: [n] bool, which have; None before the first step.
    """

    x: Tensor
    round: int = 0
    x0: Tensor | None = None
    joined: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Peers(Strategy):
    """A strategy without a server: clients take a step of their own and mix their models.

    Args:
        local: gives the batch size and the learning rate (and its schedule).
        topology: who hears whom in each step, and how much it counts.
    """

    local: LocalTraining
    topology: Annotated[Topology, FromTable("topology", "complete")] = Complete()
    traits: ClassVar[Traits] = Traits(
        local_rules="rate",
        bears_buffers=False,
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

    def check_fleet(self, fleet: Fleet, x: Tensor) -> None:
        with at("strategy.topology"):
            graph = fleet.graph(self.topology)
        self.check_graph(graph)

    def check_graph(self, graph: Graph) -> None:  # noqa: B027
        """Refuse a graph on which this strategy is not sound.

        Raises:
            ConfigError: naming a peer, and the numbers that do not fit.
        """

    def init(self, x0: Tensor) -> State:
        return State(x0, x0=x0)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        half = fleet.ask(fleet.clients, self.half_step, cost=self.cost, x0=s.x0)
        if not bool(fleet.honest(half.ids).any()):
            raise TooFewRows("no honest client is there")
        out = self.exchange(fleet, half)
        x, spread = honest_mean(fleet, out)
        joined = torch.zeros(len(fleet.clients), dtype=torch.bool) if s.joined is None else s.joined.clone()
        joined[half.ids] = True
        return State(x, s.round + 1, None if bool(joined.all()) else s.x0, joined), {"honest_spread": spread}

    @abstractmethod
    def half_step(self, clients: Cohort, x0: Tensor | None) -> dict[str, Tensor]:
        """What each client sends to its neighbours."""

    def exchange(self, fleet: Fleet, half: Replies) -> Replies:
        """What clients make of their neighbours' vectors."""
        return fleet.exchange(half, self.mix, graph=fleet.graph(self.topology))

    def mix(self, clients: Cohort, inbox: Inbox) -> dict[str, Tensor]:
        """{"x": [C, P]}: each client's new model, which it keeps."""
        clients.memory["x"] = x = self.combine(inbox["h"], inbox.heard)
        return {"x": x}

    @abstractmethod
    def combine(self, v: Tensor, heard: Graph) -> Tensor:
        """[C, P]: what each client makes of those of the vectors sent [M, P] that it heard, as attackers know too."""

    def mixing(self) -> Mix:
        return self.combine

    # For client halves -------------------------------------------------------------------------------------------

    def model(self, clients: Cohort, x0: Tensor | None) -> Tensor:
        """[C, P]: each client's model, that of the start if it has not been there yet."""
        if x0 is None:
            return clients.memory["x"]
        joined = clients.memory.read("joined", (1,))
        clients.memory["joined"] = torch.ones_like(joined)
        return torch.where(joined > 0, clients.memory["x"].to(x0), x0)

    def gradient(self, clients: Cohort, theta: Tensor) -> Tensor:
        """[C, P]: of each client's minibatch at its model [C, P]."""
        return gradient(clients, theta, batch_size=self.local.schedule.batch_size)[0]

    def rate(self, clients: Cohort) -> float:
        """The learning rate of this round, which every client knows from the experiment file."""
        return self.local.rate_at(int(clients.rounds[0]))


@dataclass(frozen=True, kw_only=True)
class MomentumPeers(Peers):
    """Peers that step along their momentum m_i = beta m_i + (1 - beta) g_i, and mix by a rule that bears liars.

    Args:
        beta: momentum, in [0, 1).
        f: byzantine vectors to survive among those that a client hears.
    """

    beta: float = 0.9
    f: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if self.f < 0:
            raise ValueError(f"f must not be negative, got {self.f}")

    def half_step(self, clients: Cohort, x0: Tensor | None) -> dict[str, Tensor]:
        theta = self.model(clients, x0)
        clients.memory["m"] = m = self.beta * clients.memory["m"] + (1 - self.beta) * self.gradient(clients, theta)
        return {"h": theta - self.rate(clients) * m}


def honest_mean(fleet: Fleet, replies: Replies) -> tuple[Tensor, float]:
    """(mean [P] of the honest clients' models, mean squared distance to it)."""
    models, honest = replies["x"], fleet.honest(replies.ids)
    models = models if bool(honest.all()) else models[honest.to(models.device)]
    mean = models.mean(0)
    some = models.split(max(1, numbers_at_once(models.device) // max(1, len(mean))))
    return mean, float(torch.cat([torch.linalg.vecdot(d, d) for d in (part - mean for part in some)]).mean())
