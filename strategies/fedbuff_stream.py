"""FedBuff, streaming: a client that finishes is replaced at once, and the server steps when its buffer is full.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba. Federated Learning with Buffered Asynchronous Aggregation.
arXiv:2106.06639, algorithm 1: each update is scaled by (1 + staleness)^-a and the buffer is averaged.

Letters: N clients, c the buffer's size, P parameters, a the exponent of the staleness weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.local_training import LocalTraining, Reply
from fedsim.cohort import Cohort
from fedsim.fleet import Fleet, choose
from fedsim.strategies.clocks import able
from fedsim.strategies.server import step_along


@dataclass(frozen=True)
class State:
    """x: [P], the server's model; busy: [W] clients at work."""

    x: Tensor
    busy: Tensor


@dataclass(frozen=True, kw_only=True)
class FedBuffStream:
    """Keep a number of clients at work; step when c updates have arrived.

    Args:
        buffer_size: c.
        concurrency: clients at work at any time.
        server_lr: step along the buffer's mean.
        exponent: a of the staleness weight (1 + staleness)^-a.
        local: local training.
    """

    buffer_size: int = 10
    concurrency: int = 100
    server_lr: float = 1.0
    exponent: float = 0.5
    local: LocalTraining

    def __post_init__(self) -> None:
        if self.buffer_size < 1 or self.concurrency < 1:
            raise ValueError(
                f"buffer_size and concurrency must be at least 1, got {self.buffer_size} and {self.concurrency}"
            )
        if self.exponent < 0:
            raise ValueError(f"exponent must not be negative, got {self.exponent}")

    def init(self, x0: Tensor) -> State:
        return State(x0, torch.zeros(0, dtype=torch.int64))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        total, idle, busy = torch.zeros_like(s.x), self.idle(fleet, s.busy), s.busy
        for _ in range(self.buffer_size):
            fresh = choose(torch.nonzero(idle).flatten(), self.concurrency - len(busy), rng)
            fleet.send(fresh, self.local_update, cost=self.local.cost, x=s.x)
            r = fleet.receive(count=1)
            total += r.weighted("delta", (1.0 + r.staleness.double()) ** -self.exponent, like=s.x)
            idle[fresh], idle[r.ids] = False, True
            busy = torch.cat([busy, fresh])
            busy = busy[~idle[busy]]
        x = step_along(s.x, total / self.buffer_size, self.server_lr, self.local.num_trainable)
        return State(x, busy), {}

    def idle(self, fleet: Fleet, busy: Tensor) -> Tensor:
        """[N] bool: clients that have data and no work."""
        clients = able(fleet)
        if self.concurrency > len(clients):
            raise ValueError(
                f"strategy.concurrency={self.concurrency} exceeds the {len(clients)} clients with data; lower it"
            )
        out = torch.zeros(len(fleet.clients), dtype=torch.bool)
        out[clients], out[busy] = True, False
        return out

    def local_update(self, clients: Cohort, x: Tensor) -> Reply:
        return {"delta": self.local(clients, x).delta}
