"""MASHA1: compressed variational inequalities with unbiased compressors, in both directions.

Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov. Distributed Methods with Compressed Communication for Solving
Variational Inequalities, with Theoretical Guarantees. arXiv:2110.03313, algorithm 1; its skeleton is the
variance-reduced extragradient of Alacaoglu and Malitsky (arXiv:2102.08352). What is compressed is the difference
F_m(z_half) - F_m(w); the reference w moves to the new iterate with probability p = 1 - tau in the paper's letters.
Here h = 0, so that the prox is the identity.

Letters: M clients, P entries; z the iterate, w the reference, F the mean of the clients' operators F_m, Q a client's
compressor, Q_s the server's, v what the server sends. Every client keeps z, w, F(w) and its own F_m(w).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.oracle import full_gradient
from fedsim.cohort import Cohort
from fedsim.compress.packet import Compressor, Packet
from fedsim.compress.sparsify import Identity
from fedsim.config import FromTable
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.checks import check_refresh
from fedsim.strategies.compressed import server_streams
from fedsim.strategies.reference import UNIFORM, keep_mean, move_reference, refresh


@dataclass(frozen=True)
class State:
    """x: [P], the iterate z; w: [P], the reference; fw: [P], F(w); round: iterations so far."""

    x: Tensor
    w: Tensor
    fw: Tensor
    round: int = 0


@dataclass(frozen=True, kw_only=True)
class Masha1:
    """Compressed extragradient with a reference point that is refreshed at random.

    Args:
        lr: gamma.
        p: probability of a refresh, about the compression ratio; 1 with no compression is extragradient.
        compressor: Q of every client; unbiased.
        server_compressor: Q_s of the server; unbiased.
    """

    lr: float
    p: float = 0.1
    compressor: Annotated[Compressor, FromTable("compressor", "identity")] = field(default_factory=Identity)
    server_compressor: Annotated[Compressor, FromTable("compressor", "identity")] = field(default_factory=Identity)

    def __post_init__(self) -> None:
        check_refresh(self.lr, self.p)
        for name in ("compressor", "server_compressor"):
            if not getattr(self, name).unbiased:
                raise ValueError(
                    f"{name} {getattr(self, name)} is biased, and masha1 diverges with it; use an unbiased one "
                    "(rand_k, qsgd, natural) or strategy masha2, which has error feedback"
                )

    def init(self, x0: Tensor) -> State:
        return State(x0, x0, torch.zeros_like(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        if s.round == 0:
            s = replace(s, w=s.x, fw=refresh(fleet, self.full, self.keep, z=s.x))
        z_bar = (1 - self.p) * s.x + self.p * s.w
        cost = Cost(bits_up=self.compressor.bits(s.x.numel()))
        r = fleet.ask(fleet.clients, self.difference, cost=cost, fold=UNIFORM)
        v = self.server_compressor.encode(r["d"][None], server_streams(s.x, s.round, rng))
        z = z_bar - self.lr * (v.decode()[0] + s.fw)
        b = bool(rng.random() < self.p)
        fleet.ask(fleet.clients, self.move, cost=Cost(steps=0, bits_up=0), v=v, b=b)
        s = State(z, s.w, s.fw, s.round + 1)
        if b:  # the reference moves to the new iterate
            s = replace(s, w=z, fw=refresh(fleet, self.full, self.keep))
        return s, {"refresh": int(b)}

    # Client halves

    def difference(self, clients: Cohort) -> dict[str, Packet]:
        z, w, fw = clients.memory["z"], clients.memory["w"], clients.memory["fw"]
        z_half = (1 - self.p) * z + self.p * w - self.lr * fw
        d = full_gradient(clients, z_half) - clients.memory["f_m"]
        return {"d": self.compressor.encode(d, clients.streams)}

    def move(self, clients: Cohort, v: Tensor, b: bool) -> dict[str, Tensor]:
        z, w, fw = clients.memory["z"], clients.memory["w"], clients.memory["fw"]
        clients.memory["z"] = (1 - self.p) * z + self.p * w - self.lr * (v + fw)
        return {}

    def full(self, clients: Cohort, z: Tensor | None) -> dict[str, Tensor]:
        return move_reference(clients, z)

    def keep(self, clients: Cohort, fw: Tensor) -> dict[str, Tensor]:
        return keep_mean(clients, fw)
