"""Hard batches: after one pass over all minibatches, train on the fraction with the largest last-seen losses.

Can we learn better with hard samples? (DyBAT), as the authors' training loop. Minibatches are fixed once: no
reshuffling, and a partial last one is dropped. In the first cycle every batch is used in order, and the loss at its
own step is recorded. Each later cycle takes the first max(1, floor(delta * count)) batches by recorded loss, largest
first (stable), trains on them in the data's order and overwrites their entries; the others' losses stay stale. Training
is over after epochs * count steps whatever delta is. The authors' loop stops learning without a word when
floor(delta * count) = 0.

Letters: C clients, n batches of the client that has most, m those of the longest cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HardBatches:
    """The policy; its table of losses [C, n] is a row a client keeps across rounds, infinite before the first visit.

    >>> policy = HardBatches(delta=0.5)
    >>> policy.cycle(torch.tensor([[3.0, 1.0, 4.0, 2.0]]), torch.tensor([4]))
    (tensor([[0, 2]]), tensor([2]))

    Args:
        delta: share of its batches that a client trains on after the first cycle, in (0, 1].
    """

    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 1:
            raise ValueError(f"HardBatches.delta is a share in (0, 1], got {self.delta}")

    def table(self, num_batches: Tensor) -> Tensor:
        """[C, n] losses of clients that have seen nothing: infinity, so that all batches come first."""
        return torch.full((len(num_batches), int(num_batches.max())), float("inf"))

    def cycle(self, losses: Tensor, num_batches: Tensor) -> tuple[Tensor, Tensor]:
        """Which batches the next cycle of each client trains on, in the data's order.

        Args:
            losses: [C, n] last recorded loss of each batch; infinity where there is none yet.
            num_batches: [C] int64, how many batches each client has; entries of `losses` beyond it are ignored.

        Returns:
            (index [C, m], length [C]): the first `length` entries of a row count, the rest repeat the last of them.
        """
        n = losses.shape[1]
        column = torch.arange(n, device=losses.device)
        real = column < num_batches[:, None]
        unseen = (torch.isinf(losses) & real).any(1)
        share = torch.floor(self.delta * num_batches.double()).long().clamp_(min=1)
        length = torch.where(unseen, num_batches, share)
        order = torch.sort(torch.where(real, losses, float("-inf")), dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, column.expand_as(order))
        chosen = (rank < length[:, None]) & real
        index = torch.sort(torch.where(chosen, column, n), dim=1).values[:, : int(length.max())]
        last = index.gather(1, (length - 1)[:, None])
        return torch.minimum(index, last), length

    def record(self, losses: Tensor, index: Tensor, value: Tensor) -> None:
        """Write the losses [C] seen at batches index [C] to the table, in place."""
        losses.scatter_(1, index[:, None], value[:, None].to(losses.dtype))
