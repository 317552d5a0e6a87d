"""EF21: descent along estimates of the clients' gradients, which move by what a contractive compressor lets through.

Richtarik, Sokolov, Fatkhullin. EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback.
arXiv:2106.05203, algorithm 2; a cohort_size makes it EF21-PP, and minibatches EF21-SGD, of Fatkhullin, Sokolov,
Gorbunov, Li, Richtarik. EF21 with Bells & Whistles. arXiv:2110.03294. A compressed `downlink` adds EF21-P (Gruntkowska,
Tyurin, Richtarik. arXiv:2209.15218). [memory; consequences checked by the tests]

    c_i = C(grad_i(x) - g_i),   g_i <- g_i + c_i,   g <- g + (1/N) sum of c_i,   x <- x - eta * g

g_i is zero at first, so that the first message is C(grad_i(x0)), as in the paper.

Letters: N clients, S of them in a round, P parameters; x the server's model, g the mean of all g_i, eta the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.error_feedback import compress_difference, contractive
from fedsim.compress.packet import Packet
from fedsim.compress.sender import Sender
from fedsim.fleet import Fleet
from fedsim.strategies.descent import CompressedDescent
from fedsim.strategies.server import UNIFORM, ServerState
from fedsim.task import Constants


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """g: [P], the mean of all clients' g_i."""

    g: Tensor


@dataclass(frozen=True, kw_only=True)
class EF21(CompressedDescent):
    """Gradient descent whose clients send compressed changes of their gradients; converges with Top-k.

    Args:
        compressor: C of every client; contractive, or unbiased and then scaled down.
    """

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), g=torch.zeros_like(x0))

    def proven(self, constants: Constants, num_entries: int) -> tuple[float, float] | None:
        delta = contractive(self.compressor, num_entries).delta(num_entries)
        if not constants.potential or self.cohort_size is not None or delta is None:
            return None
        left = (1 - 1 / delta) ** 0.5
        return self.lr, 1 / (constants.of_mean + constants.rms * left / (1 - left))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s, r = self.ask(s, fleet, rng, self.difference, rule=UNIFORM, x=s.x)
        g = s.g + len(r) / len(fleet.clients) * r.mean("c", UNIFORM)  # who is not asked keeps its g_i
        return replace(self.descend(s, fleet, g), g=g), {}

    def difference(self, clients: Cohort, x: Tensor) -> dict[str, Packet]:
        gradient, g_i = self.gradient_at(clients, x).dense(), clients.memory["g"]
        c, clients.memory["g"] = compress_difference(gradient, g_i, self.compressor, Sender.of(clients, "c"))
        return {"c": c}
