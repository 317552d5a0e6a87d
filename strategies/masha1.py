"""MASHA1: compressed variational inequalities with unbiased compressors, in both directions.

Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov. Distributed Methods with Compressed Communication for Solving
Variational Inequalities, with Theoretical Guarantees. arXiv:2110.03313, algorithm 1; its skeleton is the
variance-reduced extragradient of Alacaoglu and Malitsky (arXiv:2102.08352). What is compressed is the difference
F_m(z_half) - F_m(w); the reference w moves to the new iterate with probability p = 1 - tau in the paper's letters.
prox is that of the task; it is the identity where h = 0.

Letters: M clients, P entries; z the iterate, w the reference, F the mean of the clients' operators F_m, Q a client's
compressor, Q_s the server's, v what the server sends. Every client keeps z, w, F(w) and its own F_m(w).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.packet import Packet
from fedsim.compress.sender import Sender
from fedsim.fleet import Cost, Fleet
from fedsim.prox import FREE, Prox
from fedsim.strategies.descent import check_unbiased, unbiased_omega
from fedsim.strategies.reference import NOTHING_UP, Referring, State, server_sender
from fedsim.strategies.server import UNIFORM
from fedsim.task import Constants


@dataclass(frozen=True, kw_only=True)
class Masha1(Referring):
    """Compressed extragradient with a reference point that is refreshed at random.

    Args:
        compressor: Q of every client; unbiased.
        server_compressor: Q_s of the server; unbiased.
        prox: of the task.
    """

    prox: Prox = FREE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unbiased(self, "masha2")

    def init(self, x0: Tensor) -> State:
        return State(x0, x0, torch.zeros_like(x0))

    def proven(self, constants: Constants, num_entries: int) -> tuple[float, float] | None:
        """min(sqrt(p) / (2 C_q), p / (2 mu)), C_q^2 = q_s / M^2 * sum of (q L_m^2 + (M - 1) mean of L_m^2)."""
        if self.cohort_size is not None or self.batch_size is not None:
            return None
        q, q_s = (1 + unbiased_omega(c, num_entries) for c in (self.compressor, self.server_compressor))
        c_q = (q_s * (q + len(constants.each) - 1) / len(constants.each)) ** 0.5 * constants.rms
        bound = self.p**0.5 / (2 * c_q)
        return self.lr, min(bound, self.p / (2 * constants.mu)) if constants.mu else bound

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s = self.begun(s, fleet)
        z_bar = (1 - self.p) * s.x + self.p * s.w
        cost = Cost(bits_up=self.compressor.bits(s.x.numel()))
        r = fleet.ask(self.cohort(fleet, rng), self.difference, cost=cost, fold=UNIFORM)
        sender = server_sender(s.x, s.round, rng, s.kept)
        v = sender.encode(self.server_compressor, r["d"][None])
        z = self.prox(z_bar - self.lr * (v.decode()[0] + s.fw), self.lr)
        b = bool(rng.random() < self.p)
        fleet.ask(fleet.clients, self.move, cost=NOTHING_UP, v=v, b=b)
        return self.moved(replace(s, kept=sender.memory.written), z, b, fleet), {"refresh": int(b)}

    # Client halves

    def difference(self, clients: Cohort) -> dict[str, Packet]:
        d = self.from_reference(clients, self.prox(self.half_point(clients), self.lr))
        return {"d": Sender.of(clients, "d").encode(self.compressor, d)}

    def move(self, clients: Cohort, v: Tensor, b: bool) -> dict[str, Tensor]:
        z, w, fw = clients.memory["z"], clients.memory["w"], clients.memory["fw"]
        clients.memory["z"] = self.prox((1 - self.p) * z + self.p * w - self.lr * (v + fw), self.lr)
        return {}
