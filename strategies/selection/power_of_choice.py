"""Power-of-choice: of some candidates those with the largest loss.

Cho, Wang, Joshi. Client Selection in Federated Learning: Convergence Analysis and Power-of-Choice Selection Strategies.
arXiv:2010.01243: d candidates are drawn in proportion to samples, without replacement; the server sends them its model
and gets their local losses; the S largest take part. With remembered losses (the paper's rpow-d) nobody is asked: a
client's loss is the mean over the steps of its last job, infinite for one that has done none.

Letters: N clients, d candidates, S chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Replies
from fedsim.strategies.selection.base import Among, Known, Selection, drawn, renewed, train_losses


@dataclass(frozen=True, kw_only=True)
class PowerOfChoice(Selection):
    """Of some candidates those with the largest loss.

    Args:
        candidates: d, at least S; S is a draw in proportion to samples, and more prefer large losses more.
        losses: asked, of all candidates' data at the server's model, which are one more message each way and a pass
            forward over the data; remembered, of their last jobs, which cost nothing.
    """

    candidates: int
    losses: Literal["asked", "remembered"] = "asked"

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")

    @property
    def asks(self) -> bool:
        return self.losses == "asked"

    def start(self, num_clients: int, count: int) -> Known:
        if not count <= self.candidates <= num_clients:
            raise ValueError(
                f"candidates={self.candidates} must lie between the {count} clients of a round and all {num_clients}"
            )
        return {} if self.asks else {"loss": torch.full((num_clients,), inf, dtype=torch.float64)}

    def choose(self, known: Known, among: Among, rng: np.random.Generator) -> tuple[Tensor, Known]:
        size = min(max(self.candidates, among.count), len(among.clients))
        found = among.clients[drawn(among.samples, size, rng)]
        losses = among.losses(found) if self.asks else known["loss"][found]
        # of equal losses the one that was drawn first
        order = losses.nan_to_num(nan=-inf, posinf=inf, neginf=-inf).argsort(descending=True, stable=True)
        return found[order[: among.count]].sort().values, known

    def noted(self, known: Known, replies: Replies, round: int) -> Known:
        if self.asks:
            return known
        return {"loss": renewed(known["loss"], replies.ids, train_losses(replies, "power_of_choice"))}
