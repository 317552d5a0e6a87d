"""MASHA2: compressed variational inequalities with contractive compressors and error feedback.

Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov. Distributed Methods with Compressed Communication for Solving
Variational Inequalities, with Theoretical Guarantees. arXiv:2110.03313, algorithm 2 (h = 0). As MASHA1, but the step
enters the message before compression, and what compression leaves out enters the next message; errors outlive a
refresh of the reference.

Letters: M clients, P entries; z the iterate, w the reference, F the mean of the clients' operators F_m, C a client's
compressor, C_s the server's, e_m and e their errors, c what the server sends.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.compress.error_feedback import compress_with_error
from fedsim.compress.packet import Compressor, Packet
from fedsim.compress.sparsify import Identity
from fedsim.config import FromTable
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.checks import check_refresh
from fedsim.strategies.compressed import server_streams
from fedsim.strategies.reference import UNIFORM, keep_mean, move_reference, refresh


@dataclass(frozen=True)
class State:
    """x: [P], the iterate z; w: [P], the reference; fw: [P], F(w); e: [P], the server's error; round: iterations."""

    x: Tensor
    w: Tensor
    fw: Tensor
    e: Tensor
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Masha2:
    """MASHA with error feedback, for biased compressors such as Top-k.

    Args:
        lr: gamma.
        p: probability of a refresh of the reference.
        compressor: C of every client; contractive.
        server_compressor: C_s of the server; contractive.
    """

    lr: float
    p: float = 0.1
    compressor: Annotated[Compressor, FromTable("compressor", "identity")] = field(default_factory=Identity)
    server_compressor: Annotated[Compressor, FromTable("compressor", "identity")] = field(default_factory=Identity)

    def __post_init__(self) -> None:
        check_refresh(self.lr, self.p)

    def init(self, x0: Tensor) -> State:
        zero = torch.zeros_like(x0)
        return State(x0, x0, zero, zero)

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        if s.round == 0:
            s = replace(s, w=s.x, fw=refresh(fleet, self.full, self.keep, z=s.x))
        z_bar = (1 - self.p) * s.x + self.p * s.w
        cost = Cost(bits_up=self.compressor.bits(s.x.numel()))
        r = fleet.ask(fleet.clients, self.difference, cost=cost, fold=UNIFORM)
        c, e = compress_with_error(r["c"][None], s.e[None], self.server_compressor, server_streams(s.x, s.round, rng))
        z = z_bar - self.lr * s.fw - c.decode()[0]
        b = bool(rng.random() < self.p)
        fleet.ask(fleet.clients, self.move, cost=Cost(steps=0, bits_up=0), c=c, b=b)
        s = State(z, s.w, s.fw, e[0], s.round + 1)
        if b:  # the reference moves to the new iterate; errors stay
            s = replace(s, w=z, fw=refresh(fleet, self.full, self.keep))
        return s, {"refresh": int(b)}

    # Client halves

    def difference(self, clients: Cohort) -> dict[str, Packet]:
        z, w, fw = clients.memory["z"], clients.memory["w"], clients.memory["fw"]
        z_half = (1 - self.p) * z + self.p * w - self.lr * fw
        d = self.lr * (full_gradient(clients, z_half) - clients.memory["f_m"])
        c, clients.memory["e"] = compress_with_error(d, clients.memory["e"], self.compressor, clients.streams)
        return {"c": c}

    def move(self, clients: Cohort, c: Tensor, b: bool) -> dict[str, Tensor]:
        z, w, fw = clients.memory["z"], clients.memory["w"], clients.memory["fw"]
        clients.memory["z"] = (1 - self.p) * z + self.p * w - self.lr * fw - c
        return {}

    def full(self, clients: Cohort, z: Tensor | None) -> dict[str, Tensor]:
        return move_reference(clients, z)

    def keep(self, clients: Cohort, fw: Tensor) -> dict[str, Tensor]:
        return keep_mean(clients, fw)
