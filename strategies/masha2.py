"""MASHA2: compressed variational inequalities with contractive compressors and error feedback.

Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov. Distributed Methods with Compressed Communication for Solving
Variational Inequalities, with Theoretical Guarantees. arXiv:2110.03313, algorithm 2 (h = 0). As MASHA1, but the step
enters the message before compression, and what compression leaves out enters the next message; errors outlive a
refresh of the reference.

Letters: M clients, P entries; z the iterate, w the reference, F the mean of the clients' operators F_m, C a client's
compressor, C_s the server's, e_m and e their errors, c what the server sends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.error_feedback import compress_with_error
from fedsim.compress.packet import Packet
from fedsim.compress.sender import Sender
from fedsim.fleet import Cost, Fleet
from fedsim.strategies import reference
from fedsim.strategies.reference import NOTHING_UP, Referring, server_sender
from fedsim.strategies.server import UNIFORM


@dataclass(frozen=True, kw_only=True)
class State(reference.State):
    """e: [P], the server's error."""

    e: Tensor


@dataclass(frozen=True, kw_only=True)
class Masha2(Referring):
    """MASHA with error feedback, for biased compressors such as Top-k.

    Args:
        compressor: C of every client; contractive.
        server_compressor: C_s of the server; contractive.
    """

    def init(self, x0: Tensor) -> State:
        zero = torch.zeros_like(x0)
        return State(x0, x0, zero, e=zero)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s = self.begun(s, fleet)
        z_bar = (1 - self.p) * s.x + self.p * s.w
        cost = Cost(bits_up=self.compressor.bits(s.x.numel()))
        r = fleet.ask(self.cohort(fleet, rng), self.difference, cost=cost, fold=UNIFORM)
        sender = server_sender(s.x, s.round, rng, s.kept)
        c, e = compress_with_error(r["c"][None], s.e[None], self.server_compressor, sender)
        z = z_bar - self.lr * s.fw - c.decode()[0]
        b = bool(rng.random() < self.p)
        fleet.ask(fleet.clients, self.move, cost=NOTHING_UP, c=c, b=b)
        s = replace(s, e=e[0], kept=sender.memory.written)  # errors outlive a refresh
        return self.moved(s, z, b, fleet), {"refresh": int(b)}

    # Client halves

    def difference(self, clients: Cohort) -> dict[str, Packet]:
        d = self.lr * self.from_reference(clients, self.half_point(clients))
        c, clients.memory["e"] = compress_with_error(d, clients.memory["e"], self.compressor, Sender.of(clients, "c"))
        return {"c": c}

    def move(self, clients: Cohort, c: Tensor, b: bool) -> dict[str, Tensor]:
        clients.memory["z"] = self.half_point(clients) - c
        return {}
