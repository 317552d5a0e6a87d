"""FedAsync: every arriving model is mixed into the server's, the less the staler it is.

Xie, Koyejo, Gupta. Asynchronous Federated Optimization. arXiv:1903.03934, algorithm 1: x <- (1 - alpha_t) x + alpha_t y
with alpha_t = alpha * s(t - tau), s constant, polynomial or hinge. [memory; checked against an event loop]

Departures: no proximal term in the local problem; staleness counts the server's steps since the client was sent its
model, so that s is 1 for a fresh one.

Letters: P parameters; x the server's model, y the one that a client sends, alpha the weight of a fresh one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.local_training import Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet
from fedsim.strategies.asynchronous import NO_COHORT, Asynchronous, State
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class FedAsync(Asynchronous):
    """Mix each client's model into the server's the moment it arrives.

    Args:
        alpha: weight of a fresh model, in (0, 1].
        staleness: s of k steps: constant, 1; polynomial, (1 + k)^-a; hinge, 1 up to b and 1 / (1 + a (k - b)) beyond.
        a: exponent of the polynomial, slope of the hinge; null is 0.5 for the one and 10 for the other.
        b: steps that the hinge forgives.
    """

    alpha: float = 0.6
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    a: float | None = None
    b: int = 4
    traits: ClassVar[Traits] = Traits(
        refused=NO_COHORT,
        no_links="clients send models, and entries that a compressor leaves out would be mixed in as zeros; "
        "async_fedavg sends changes",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is the weight of an arriving model and must lie in (0, 1], got {self.alpha}")
        if (self.a is not None and not 0 <= self.a < inf) or self.b < 0:
            raise ValueError(f"a and b shape the weight of stale models and must not be negative: {self.a}, {self.b}")

    def replies(self, num_clients: int) -> int:
        return 1

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        fleet.send(self.free(s, fleet), self.local_update, cost=self.local.cost, x=s.x)
        r = fleet.receive(count=1)
        s = replace(s, idle=r.ids)
        if not len(r):
            return replace(s, round=s.round + 1), {}
        alpha = self.alpha * self.trust(r.staleness)
        away = alpha.to(s.x)[:, None] * (s.x - r["model"])
        return self.step(s, self.rule(rng, s.last)(away, r.num_examples), weight=float(alpha)), {}

    def trust(self, staleness: Tensor) -> Tensor:
        """s(k) [R] float64 of k [R] steps."""
        k = staleness.double()
        if self.staleness == "polynomial":
            return (1 + k) ** -(0.5 if self.a is None else self.a)
        if self.staleness == "hinge":
            return 1 / (1 + (10.0 if self.a is None else self.a) * (k - self.b).clamp(min=0))
        return torch.ones_like(k)

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        return {"model": -self.local(clients, x).delta + x}
