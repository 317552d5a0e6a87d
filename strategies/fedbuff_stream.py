"""FedBuff, streaming: a client that finishes is replaced at once, and the server steps when its buffer is full.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba. Federated Learning with Buffered Asynchronous Aggregation.
arXiv:2106.06639, algorithm 1: each update is scaled by (1 + staleness)^-a and the buffer is averaged.

Letters: N clients, c the buffer's size, P parameters, a the exponent of the staleness weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Fleet, TooFewRows
from fedsim.strategies.asynchronous import Asynchronous
from fedsim.strategies.clocks import check_fits, positive
from fedsim.strategies.server import Selecting, ServerState
from fedsim.strategy import Traits

CONCURRENCY = {"cohort_size": "it keeps clients at work one by one; set strategy.concurrency"}


@dataclass(frozen=True, kw_only=True)
class FedBuffStream(Asynchronous, Selecting):
    """Keep a number of clients at work; step when c updates have arrived.

    Whoever drops out is replaced with the next arrival; where all that are at work drop out, a step has fewer updates.

    Args:
        buffer_size: c.
        concurrency: clients at work at any time.
        exponent: a of the staleness weight (1 + staleness)^-a.
    """

    buffer_size: int = 10
    concurrency: int = 100
    exponent: float = 0.5
    traits: ClassVar[Traits] = Traits(refused=CONCURRENCY)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("buffer_size", self.buffer_size)
        positive("concurrency", self.concurrency)
        if not 0 <= self.exponent < inf:
            raise ValueError(f"exponent must be 0 or more, got {self.exponent}")
        if self.selection.asks:
            raise ValueError("selection: clients are replaced at once, without asking others; use remembered losses")

    def replies(self, num_clients: int) -> int:
        return self.buffer_size

    def wanted(self, num_clients: int) -> int:
        return 1

    def check_fleet(self, fleet: Fleet, x: Tensor) -> None:
        super().check_fleet(fleet, x)
        check_fits("concurrency", self.concurrency, fleet)

    def round(self, s: ServerState, fleet: Fleet, rng: np.random.Generator) -> tuple[ServerState, dict[str, Any]]:
        rule, num_examples = self.rule(rng, s.last), list[Tensor]()
        rows = s.x.new_empty(self.buffer_size, len(s.x))
        for _ in range(self.buffer_size):
            among = self.among(s, fleet, fleet.present(with_data=True), self.concurrency - fleet.num_at_work)
            s, fresh = self.choose(s, among, rng)
            fleet.send(fresh, self.local_update, cost=self.local.cost, x=s.x)
            r = fleet.receive(count=1)
            if len(r):  # else all that were at work dropped out
                s = self.noted(s, r)
                weights = (1.0 + r.staleness.double()) ** -self.exponent
                rows[len(num_examples)] = r.weighted("delta", weights, like=s.x)
                num_examples.append(r.num_examples.sum())
        if not num_examples:
            raise TooFewRows("nobody replied", s)
        return self.step(s, rule(rows[: len(num_examples)], torch.stack(num_examples))), {}
