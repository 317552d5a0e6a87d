"""FedProx: local steps on f_i(y) + mu / 2 |y - x|^2, which keeps unlike clients from drifting far.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. arXiv:1812.06127,
algorithm 2, whose inexact minimisers are local steps here. The pull is part of the gradient, whatever the optimizer.

Letters: P parameters; x the server's model, y a local one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.direction import GRADIENT, MODEL
from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.server import Rule, ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class FedProx(Synchronous):
    """FedAvg with a pull of local models towards the server's.

    Args:
        mu: strength of the pull; 0 is FedAvg. Local steps follow it only where lr * mu stays well below 1.
        aggregator: how updates become one; the mean weighs clients by their samples unless told otherwise.
    """

    mu: float = 0.01
    aggregator: Rule = Mean()
    traits: ClassVar[Traits] = Traits(bears_weights=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mu < float("inf"):
            raise ValueError(f"mu is the strength of a pull and must be 0 or more, got {self.mu}")

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule = self.rule(rng, s.last)
        s, r = self.ask(s, fleet, rng, self.local_update, rule=rule, x=s.x)
        return self.step(s, r.mean("delta", rule)), {}

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x, GRADIENT + self.mu * (MODEL - x)).delta}
