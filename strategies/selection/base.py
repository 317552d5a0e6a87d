"""Selections: who takes part in a round.

A selection is frozen settings. What it remembers of the clients is in the server's state, and what it draws comes from
the round's own generator, so that a run that was stopped goes on as if it had not been.

Letters: N clients, A of them present, S of these chosen, R replies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Fold, Replies

Known = Mapping[str, Tensor]
"""What a selection remembers, on the host; it is never written to, so that a state stays as it is."""

TINY = 1e-300  # in place of a weight of zero: it adds nothing to others, and is drawn when no other is left


@dataclass(frozen=True)
class Among:
    """What a selection chooses from.

    Args:
        clients: [A] ids of those present, ascending.
        count: S, how many to choose; at most A.
        num_examples: [N] samples of every client.
        round: server steps before this one.
        losses: (ids [d]) -> [d] float64, their mean losses at the server's model, which they are asked for: that takes
            time and bits. Minus infinity for one that does not answer.
    """

    clients: Tensor
    count: int
    num_examples: Tensor
    round: int
    losses: Callable[[Tensor], Tensor]

    @property
    def samples(self) -> Tensor:
        """[A] float64: samples of those present."""
        return self.num_examples.index_select(0, self.clients).double()


class Selection(ABC):
    """Who takes part in a round: frozen settings."""

    weighs: ClassVar[bool] = False
    """Whether replies have weights of their own in the sum, so that it is unbiased whoever is drawn."""

    @property
    def asks(self) -> bool:
        """Whether it asks clients and waits for their answers before it chooses."""
        return False

    def start(self, num_clients: int, count: int) -> Known:
        """What it knows before the first round.

        Args:
            num_clients: N.
            count: S of most rounds.

        Raises:
            ValueError: if its settings do not fit these numbers.
        """
        return {}

    @abstractmethod
    def choose(self, known: Known, among: Among, rng: np.random.Generator) -> tuple[Tensor, Known]:
        """([S] ids, ascending; what it knows from now on)."""

    def noted(self, known: Known, replies: Replies, round: int) -> Known:
        """What it knows after R > 0 replies to a round's work came, `round` server steps after the start."""
        return known

    def weights(self, fold: Fold | None, among: Among, ids: Tensor) -> Tensor | None:
        """[S] float64 weights of those chosen in the sum that replaces `fold`; None for the fold's own."""
        return None


def train_losses(replies: Replies, name: str) -> Tensor:
    """[R] float64: each client's mean training loss.

    Raises:
        ValueError: if clients did not log it.
    """
    if "train_loss" not in replies.logged:
        raise ValueError(
            f"selection {name} learns from the losses of clients' training, and this strategy's clients log none: take "
            "uniform or cyclic, or let the client half call cohort.log(train_loss=...)"
        )
    return replies.logged["train_loss"]


def drawn(weights: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """[count] distinct places in the order of drawing, each drawn in proportion to the weights [A] of those left.

    Those of weight zero come after all others.
    """
    w = np.maximum(weights.double().numpy(), TINY)
    return torch.from_numpy(rng.choice(len(w), size=count, replace=False, p=w / w.sum()))


def renewed(rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """A copy of rows [N] with those of some clients [R] replaced."""
    out = rows.clone()
    out[ids] = values.to(out)
    return out
