"""Ditto: a personal model beside the global one, pulled towards it.

Li, Hu, Beirami, Smith. Ditto: Fair and Robust Federated Learning Through Personalization. arXiv:2012.04221,
algorithm 1: every client of a round trains the model that it received, as in FedAvg, and its own v_i on
F_i(v) + lam / 2 |v - x|^2, which it keeps. lam = 0 is local training alone.
Departure: both take the steps of section local, on the same minibatches. Written from memory of the algorithm.

Letters: P parameters; x the server's model, v_i a client's own, x^0 at first.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.direction import GRADIENT, MODEL
from fedsim.clients.kept import check_one_state, keep, recalled, x0
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.momentum import twice
from fedsim.strategies.server import Rule, ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class Ditto(Synchronous):
    """FedAvg, and for every client a model of its own that is pulled towards the server's.

    Args:
        lam: strength of the pull.
        aggregator: how updates become one; the mean weighs clients by their samples unless told otherwise.
    """

    lam: float = 0.1
    aggregator: Rule = Mean()
    traits: ClassVar[Traits] = Traits(bears_weights=True, own_models=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam < inf:
            raise ValueError(f"lam pulls towards the server's model and must be 0 or more, got {self.lam}")
        check_one_state(self.local)

    @property
    def cost(self) -> Cost:
        return twice(self.local)

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x)
        return self.step(s, r.mean("delta", rule)), {}

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        v = self.personal_model(clients, x)
        keep(clients, "v", v - self.local(clients, v, GRADIENT + self.lam * (MODEL - x)).delta.dense())
        return {"delta": self.local(clients, x).delta}

    def personal_model(self, clients: Cohort, x: Tensor) -> Tensor:
        return recalled(clients, "v", x0(clients))
