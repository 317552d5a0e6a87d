"""Uncoded gradient descent on many workers, all of whom are waited for: what gradient coding is compared with.

Every worker sends the gradient of its own chunk. Letters: n workers, P parameters, t a round and its job.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.coding import Coding, State
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class Uncoded(Coding):
    """Gradient descent that waits for every worker; mu has no say."""

    traits: ClassVar[Traits] = replace(Coding.traits, needs_all="a step needs every worker's chunk")

    def init(self, x0: Tensor) -> State:
        return State(x0, self.copies(x0))

    def replies(self, num_clients: int) -> int:
        return num_clients

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        t = s.round
        if self.starts(t):
            r = fleet.ask(fleet.clients, self.gradient, fold=Mean(), x=self.model(s, t))
            if len(r) == self.count:  # else a worker never answered, and the job is lost
                s = self.step(s, t, r["g"])
        return replace(s, round=t + 1), {"jobs_done": s.done}

    def gradient(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {"g": full_gradient(clients, x)}
