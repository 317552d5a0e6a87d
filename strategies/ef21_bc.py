"""EF21-BC: EF21 in both directions; clients take the server's step themselves.

Fatkhullin, Sokolov, Gorbunov, Li, Richtarik. EF21 with Bells & Whistles: Practical Algorithmic Extensions of Modern
Error Feedback. arXiv:2110.03294. [memory; consequences checked by the tests]

    c_i = C(grad_i(x) - g_i),   g_i <- g_i + c_i,   g <- g + mean of c_i
    b = C_s(g - v),   v <- v + b,   x <- x - eta * v   at the server and at all clients, which are sent b

Letters: P parameters; x the model, g the mean of all clients' g_i, v the estimate that everybody has, eta the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.error_feedback import compress_difference
from fedsim.compress.packet import Compressor, Packet
from fedsim.compress.sender import Sender
from fedsim.compress.sparsify import Identity
from fedsim.config import FromTable
from fedsim.fleet import Fleet
from fedsim.strategies.descent import ONE_MEAN, CompressedDescent
from fedsim.strategies.reference import NOTHING_UP, server_sender
from fedsim.strategies.server import EVERYBODY, NO_ROUNDS, UNIFORM, ServerState
from fedsim.strategy import Traits

ALL_FOLLOW = "all clients follow every step of the server"


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """g: [P], the mean of all clients' g_i; v: [P], what clients have of it; kept: of the server's last packet."""

    g: Tensor
    v: Tensor
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EF21BC(CompressedDescent):
    """EF21 whose server, too, sends compressed changes, of its mean estimate.

    Args:
        compressor: C of every client; contractive, or unbiased and then scaled down.
        server_compressor: C_s of the server; the same.
    """

    server_compressor: Annotated[Compressor, FromTable("compressor", "identity")] = Identity()
    traits: ClassVar[Traits] = replace(
        CompressedDescent.traits,
        needs_all=ALL_FOLLOW,
        refused=ONE_MEAN | NO_ROUNDS | dict.fromkeys((*EVERYBODY, "server_optimizer"), ALL_FOLLOW),
    )

    def init(self, x0: Tensor) -> State:
        zero = torch.zeros_like(x0)
        return State(x0, g=zero, v=zero)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s, r = self.ask(s, fleet, rng, self.difference, rule=UNIFORM, x=None if s.round else s.x)
        g = s.g + r.mean("c", UNIFORM)
        sender = server_sender(s.x, s.round, rng, s.kept)
        b, v = compress_difference(g[None], s.v[None], self.server_compressor, sender)
        fleet.ask(fleet.clients, self.move, cost=NOTHING_UP, b=b)
        return replace(self.descend(s, fleet, v[0]), g=g, v=v[0], kept=sender.memory.written), {}

    # Client halves

    def difference(self, clients: Cohort, x: Tensor | None) -> dict[str, Packet]:
        if x is not None:  # the common start
            clients.memory["x"] = x.expand(len(clients), -1)
        gradient, g_i = self.gradient_at(clients, clients.memory["x"][0]).dense(), clients.memory["g"]  # all have one x
        c, clients.memory["g"] = compress_difference(gradient, g_i, self.compressor, Sender.of(clients, "c"))
        return {"c": c}

    def move(self, clients: Cohort, b: Tensor) -> dict[str, Tensor]:
        clients.memory["v"] = v = clients.memory["v"] + b
        clients.memory["x"] = clients.memory["x"] - self.server_lr * self.local.rate_at(int(clients.rounds[0])) * v
        return {}
