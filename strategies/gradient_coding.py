"""Gradient coding: redundant chunks, so that a round needs the answers of n - s workers only.

Tandon, Lei, Dimakis, Karampatziakis. Gradient Coding: Avoiding Stragglers in Distributed Learning. ICML 2017,
arXiv:1612.03301. Every worker computes s + 1 of the n chunks, a load of (s + 1) / n. A pattern of stragglers is borne
if it can be decoded: up to s of them (the reference code of arXiv:2211.13802 stops one short of that).

Letters: n workers, P parameters, t a round and its job; B the code, l_i = sum_j B_ij g_j what worker i sends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.oracle import coded_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.codes import Code, CodeName
from fedsim.strategies.coding import Coding, State


@dataclass(frozen=True, kw_only=True)
class GradientCoding(Coding):
    """Gradient descent that bears s stragglers in a round.

    Args:
        s: stragglers that are tolerated; 0 is uncoded.
        code: cyclic, for any s, or repetition, where s + 1 divides n.
    """

    s: int
    code: CodeName = "cyclic"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.gc

    @property
    def gc(self) -> Code:
        """B."""
        return Code(self.code, self.count, self.s)

    @property
    def borne(self) -> int:
        return self.s

    @property
    def load(self) -> float:
        return (self.s + 1) / self.count

    def init(self, x0: Tensor) -> State:
        return State(x0, self.copies(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        t = s.round
        asked = torch.full((self.count,), self.starts(t))
        fleet.present(self.needed(self.count))  # waits for as many as it takes
        fleet.send(fleet.clients[asked], self.coded, cost=Cost(steps=self.steps()), x=self.model(s, t))
        heard = self.listen(fleet, asked, self.gc.suffices)
        if self.gc.suffices(heard.answered):
            s = self.step(s, t, self.gc.sum(heard.answered, heard.rows["l"]))
        return replace(s, round=t + 1), self.metrics(s, heard)

    def coded(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {"l": coded_gradient(clients, x, self.gc.matrix[clients.ids], int(clients.rounds[0]))}
