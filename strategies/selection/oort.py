"""Oort: clients that are useful and fast, and now and then new ones.

Lai, Zhu, Madhyastha, Chowdhury. Oort: Efficient Federated Learning via Guided Participant Selection. arXiv:2010.06081,
algorithm 1. In round R a client i that has taken part, last in round L_i for t_i seconds with |B_i| samples, scores

    (U_i + sqrt(0.1 log(R) / L_i)) * (T / t_i)^alpha where t_i > T,    U_i = |B_i| sqrt(mean of squared losses).

Departures. Clients say their mean training loss, which stands for the root of the mean square: the same where a
client's losses are alike, and less otherwise. U is cut at a quantile of all and then scaled to [0, 1], without which
the second term would not show (the authors' program scales it too). T is a quantile of all known durations, and the
pacer moves the quantile (their program again). New clients are drawn uniformly: their speed is not known.

Letters: N clients, A present, S chosen, R the round, from 1; U, T, t, L, alpha as above, epsilon the share of new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, nan

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Replies, choose
from fedsim.strategies.selection.base import Among, Known, Selection, drawn, renewed, train_losses


@dataclass(frozen=True, kw_only=True)
class Oort(Selection):
    """Clients with large losses on many samples that are fast, and now and then new ones.

    Args:
        alpha: how much slowness counts; 0 is not at all.
        epsilon: share of clients that are new, in the first round.
        epsilon_decay: what the share is multiplied by each round.
        epsilon_least: what it never falls below.
        cutoff: clients that score so much of the S-th best may be drawn.
        clip: quantile at which the utility is cut.
        fast: quantile of the durations up to which a client is not slow, at first.
        window: rounds after which the pacer looks whether clients were less useful than in as many before.
        pace: what it then adds to the quantile `fast`.
    """

    alpha: float = 2.0
    epsilon: float = 0.9
    epsilon_decay: float = 0.98
    epsilon_least: float = 0.2
    cutoff: float = 0.95
    clip: float = 0.95
    fast: float = 0.3
    window: int = 20
    pace: float = 0.05

    def __post_init__(self) -> None:
        for name in ("epsilon", "epsilon_decay", "epsilon_least", "cutoff", "clip", "fast", "pace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name):g}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha:g}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 round, got {self.window}")

    def start(self, num_clients: int, count: int) -> Known:
        zero = torch.zeros(num_clients, dtype=torch.float64)
        return {
            "utility": zero,
            "seconds": zero,
            "last": torch.zeros(num_clients, dtype=torch.int64),  # L, 0 for one that is new
            "fast": torch.tensor(self.fast, dtype=torch.float64),
            "useful": torch.tensor([nan, 0.0], dtype=torch.float64),  # utilities of the last window and of this one
            "since": torch.tensor(0),  # the round after which this window began
        }

    def choose(self, known: Known, among: Among, rng: np.random.Generator) -> tuple[Tensor, Known]:
        met = known["last"][among.clients] > 0
        old, new = among.clients[met], among.clients[~met]
        epsilon = max(self.epsilon * self.epsilon_decay**among.round, self.epsilon_least)
        share = int(epsilon * among.count + rng.random())  # epsilon * S on average, even where that is less than one
        num_old = min(among.count - min(share, len(new)), len(old))
        best = old[self.exploited(self.scores(known, old, among.round + 1), num_old, rng)]
        return torch.cat([best, choose(new, among.count - num_old, rng)]).sort().values, known

    def scores(self, known: Known, ids: Tensor, round: int) -> Tensor:
        """[K] float64 of K clients that have taken part, in round R."""
        if not len(ids):
            return torch.zeros(0, dtype=torch.float64)
        utility, seconds = known["utility"][ids], known["seconds"][ids]
        utility = utility.clamp(max=quantile(utility, self.clip))
        span = utility - utility.min()
        span = span / span.max().clamp(min=1e-12)
        score = span + (0.1 * log(round) / known["last"][ids]).sqrt()
        limit = quantile(known["seconds"][known["last"] > 0], float(known["fast"]))
        return torch.where(seconds > limit, score * (limit / seconds) ** self.alpha, score)

    def exploited(self, scores: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """[count] places, drawn by score from those that have almost the count-th best or more."""
        if not count:
            return torch.zeros(0, dtype=torch.int64)
        least = self.cutoff * kth(scores, len(scores) - count)
        admitted = torch.nonzero(scores >= least).flatten()
        return admitted[drawn(scores[admitted], count, rng)]

    def noted(self, known: Known, replies: Replies, round: int) -> Known:
        ids, (before, now), fast, since = replies.ids, known["useful"].tolist(), known["fast"], known["since"]
        losses = train_losses(replies, "oort").nan_to_num(nan=0.0, posinf=0.0)  # such a run is about to be stopped
        utility = replies.num_examples * losses
        now += float(utility.sum())
        if round + 1 - int(since) >= self.window:
            fast, since = (fast + self.pace).clamp(max=1.0) if now < before else fast, torch.tensor(round + 1)
            before, now = now, 0.0
        return {
            "utility": renewed(known["utility"], ids, utility),
            "seconds": renewed(known["seconds"], ids, replies.seconds),
            "last": renewed(known["last"], ids, torch.full_like(ids, round + 1)),
            "fast": fast,
            "useful": torch.tensor([before, now], dtype=torch.float64),
            "since": since,
        }


def quantile(values: Tensor, share: float) -> float:
    """The value below which such a share of K > 0 lies; infinity for all of them.

    >>> quantile(torch.tensor([5.0, 1.0, 3.0, 9.0]), 0.5)
    5.0
    """
    return inf if share >= 1 else kth(values, int(share * len(values)))


def kth(values: Tensor, k: int) -> float:
    """The k-th smallest, from 0."""
    return float(np.partition(values.numpy(), k)[k])
