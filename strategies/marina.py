"""MARINA: descent along an estimate that compressed changes of gradients carry on, and whole ones renew at random.

Gorbunov, Burlachenko, Li, Richtarik. MARINA: Faster Non-Convex Distributed Learning with Compression. arXiv:2102.07845,
algorithm 1; with a batch size VR-MARINA, algorithm 2, whose changes are of one minibatch at both points.

    with probability p, and at first:  g <- mean of grad_i(x)     else:  g <- g + mean of Q(grad_i(x) - grad_i(x_prev))
    x_prev, x <- x, x - eta * g

Letters: N clients, P parameters; x the server's model, x_prev the one before it, which clients keep, omega the
compressor's variance, eta the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.compress.packet import Packet
from fedsim.compress.sender import Sender
from fedsim.fleet import Fleet
from fedsim.strategies.descent import ONE_MEAN, CompressedDescent, check_unbiased, unbiased_omega
from fedsim.strategies.server import EVERYBODY, NO_ROUNDS, UNIFORM, ServerState
from fedsim.strategies.statistics import full_pass
from fedsim.strategy import Traits
from fedsim.task import Constants

ALL_CHANGES = "its estimate takes the changes of all clients' gradients since the round before"


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """g: [P], the estimate."""

    g: Tensor


@dataclass(frozen=True, kw_only=True)
class Marina(CompressedDescent):
    """Gradient descent whose clients send compressed changes of their gradients, and at times a whole one.

    Args:
        compressor: Q of every client; unbiased.
        p: probability of whole gradients in a round; null is 1 / (1 + omega), which balances the two kinds of messages.
    """

    p: float | None = None
    traits: ClassVar[Traits] = replace(
        CompressedDescent.traits,
        needs_all=ALL_CHANGES,
        refused=ONE_MEAN | NO_ROUNDS | dict.fromkeys(EVERYBODY, ALL_CHANGES),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unbiased(self, "ef21")
        if self.p is not None and not 0 < self.p <= 1:
            raise ValueError(f"p, the chance of whole gradients, must lie in (0, 1], got {self.p}")

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), g=torch.zeros_like(x0))

    def proven(self, constants: Constants, num_entries: int) -> tuple[float, float] | None:
        if not constants.potential:
            return None
        p, omega = self.chance(num_entries), unbiased_omega(self.compressor, num_entries)
        return self.lr, 1 / (constants.rms * (1 + ((1 - p) * omega / (p * len(constants.each))) ** 0.5))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        whole = bool(rng.random() < self.chance(len(s.x))) or not s.round
        if whole:
            s, r = self.ask(s, fleet, rng, self.whole, rule=UNIFORM, cost=full_pass(self.local), x=s.x)
            g = r.mean("gradient", UNIFORM)
        else:
            s, r = self.ask(s, fleet, rng, self.change, rule=UNIFORM, cost=replace(self.cost, steps=2), x=s.x)
            g = s.g + r.mean("change", UNIFORM)
        return replace(self.descend(s, fleet, g), g=g), {"whole": int(whole)}

    # Client halves

    def whole(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        clients.memory["x"] = x.expand(len(clients), -1)
        return {"gradient": full_gradient(clients, x)}

    def change(self, clients: Cohort, x: Tensor) -> dict[str, Packet]:
        before = self.gradient_at(clients, clients.memory["x"][0])  # all have the same
        clients.memory["x"] = x.expand(len(clients), -1)
        change = (self.gradient_at(clients, x) - before).dense()
        return {"change": Sender.of(clients, "change").encode(self.compressor, change)}

    def chance(self, num_entries: int) -> float:
        """p."""
        if self.p is not None:
            return self.p
        return 1 / (1 + unbiased_omega(self.compressor, num_entries))
