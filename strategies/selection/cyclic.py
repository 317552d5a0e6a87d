"""Cyclic selection: everybody takes part once a cycle, one group after the other.

Letters: N clients, S chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.strategies.selection.base import Among, Known, Selection


@dataclass(frozen=True, kw_only=True)
class Cyclic(Selection):
    """The clients in turn, S at a time; once a cycle each, and the last group of a cycle may be smaller.

    Whoever is away when it is its group's turn is passed over until the next cycle.

    Args:
        shuffle: whether every cycle goes in an order of its own, or all in that of the ids.
    """

    shuffle: bool = False

    def start(self, num_clients: int, count: int) -> Known:
        return {"order": torch.arange(num_clients), "next": torch.tensor(num_clients)}  # as at the end of a cycle

    def choose(self, known: Known, among: Among, rng: np.random.Generator) -> tuple[Tensor, Known]:
        order, first = known["order"], int(known["next"])
        present = torch.zeros(len(order), dtype=torch.bool)
        present[among.clients] = True
        left = first + torch.nonzero(present[order[first:]]).flatten()
        if not len(left):
            order = torch.from_numpy(rng.permutation(len(order))) if self.shuffle else order
            left = torch.nonzero(present[order]).flatten()
        turn = left[: among.count]
        return order[turn].sort().values, {"order": order, "next": turn[-1] + 1}
