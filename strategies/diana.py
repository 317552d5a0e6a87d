"""DIANA: descent with unbiased compression of the differences to vectors that learn the clients' gradients.

Mishchenko, Gorbunov, Takac, Richtarik. Distributed Learning with Compressed Gradient Differences. arXiv:1901.09269,
algorithm 1, without its prox; with a cohort_size, the same of those that are asked. On a saddle point, where the
operator takes the gradient's place, it is DIANA-SGDA (Beznosikov, Gorbunov, Berard, Loizou. arXiv:2202.07262).

    m_i = Q(grad_i(x) - h_i),   h_i <- h_i + alpha * m_i,   x <- x - eta * (h + mean of m_i),   h the mean of all h_i

Letters: N clients, S of them in a round, P parameters; x the server's model, omega the compressor's variance, eta the
step.
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
from fedsim.fleet import Fleet
from fedsim.strategies.descent import CompressedDescent, check_unbiased, unbiased_omega
from fedsim.strategies.server import UNIFORM, ServerState
from fedsim.task import Constants


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """h: [P], the mean of all clients' h_i."""

    h: Tensor


@dataclass(frozen=True, kw_only=True)
class Diana(CompressedDescent):
    """Gradient descent with unbiased compression of differences; converges where compressed gradients alone do not.

    Args:
        compressor: Q of every client; unbiased.
        alpha: how fast h_i follows, in (0, 1]; null is 1 / (1 + omega), the largest that the theory allows.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unbiased(self, "ef21")
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is the share by which h_i follows and must lie in (0, 1], got {self.alpha}")

    def init(self, x0: Tensor) -> State:
        return State(x0, self.optimizer_state(x0), h=torch.zeros_like(x0))

    def proven(self, constants: Constants, num_entries: int) -> tuple[float, float] | None:
        if not constants.potential or self.cohort_size is not None:
            return None
        omega, n = unbiased_omega(self.compressor, num_entries), len(constants.each)
        return self.lr, 1 / (float(constants.each.max()) * (1 + 4 * omega / n))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        s, r = self.ask(s, fleet, rng, self.difference, rule=UNIFORM, x=s.x)
        m, share = r.mean("m", UNIFORM), len(r) / len(fleet.clients)
        return replace(self.descend(s, fleet, s.h + m), h=s.h + self.rate(len(m)) * share * m), {}

    def difference(self, clients: Cohort, x: Tensor) -> dict[str, Packet]:
        h_i = clients.memory["h"]
        m = Sender.of(clients, "m").encode(self.compressor, self.gradient_at(clients, x).dense() - h_i)
        clients.memory["h"] = h_i + self.rate(len(x)) * m.decode()
        return {"m": m}

    def rate(self, num_entries: int) -> float:
        """alpha."""
        if self.alpha is not None:
            return self.alpha
        return 1 / (1 + unbiased_omega(self.compressor, num_entries))
