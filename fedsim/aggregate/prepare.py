"""Pre-aggregators: rows are mixed or shortened before a robust rule sees them; `Prepared` is a rule behind some.

NNM: Allouah et al. Fixing by mixing. AISTATS 2023. Bucketing: Karimireddy, He, Jaggi. arXiv:2006.09365. ARC (adaptive
robust clipping): Allouah et al. arXiv:2405.14432.

Letters: R or n rows, P entries of a row, f rows that may be faulty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate.base import PreAggregator, Tolerant, finite_rows, lengths, without_bad
from fedsim.aggregate.neighbours import mix_with_neighbours
from fedsim.fleet import Aggregator, TooFewRows


@dataclass(frozen=True, kw_only=True)
class NNM(Tolerant):
    """Replaces every row by the mean of the n - f rows nearest to it; all rows then weigh the same.

    A row that is not finite becomes NaN, which the rule that follows takes for the farthest. f < n is needed.
    """

    name: ClassVar[str] = "nnm"

    def __call__(self, v: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        if self.f >= v.shape[0]:
            raise TooFewRows(f"nnm needs more rows than f={self.f}, got n={v.shape[0]}; lower f or wait for more rows")
        return mix_with_neighbours(v, self.f), torch.ones_like(weights)


@dataclass(frozen=True, kw_only=True)
class Bucketing:
    """Means of `size` rows each, in random order; the last may be of fewer. A mean weighs as many rows as it has.

    Args:
        size: rows of a bucket.
    """

    size: int = 2

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"bucketing.size must be at least 1 row, got {self.size}")

    def __call__(self, v: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        n, rows = v.shape[0], v[torch.from_numpy(rng.permutation(v.shape[0])).to(v.device)]
        full, rest = n // self.size, n % self.size
        means = rows[: n - rest].unflatten(0, (full, self.size)).mean(dim=1)
        counts = weights.new_full((full + (rest > 0),), self.size)
        if rest:
            means, counts[-1] = torch.cat([means, rows[n - rest :].mean(dim=0, keepdim=True)]), rest
        return means, counts


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Shortens rows longer than `norm` to that length; a row that is not finite becomes zero.

    Args:
        norm: greatest length.
    """

    norm: float = 2.0

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise ValueError(f"clipping.norm must be a positive length, got {self.norm}")

    def __call__(self, v: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return _shorten(v, lengths(v), torch.tensor(self.norm, dtype=torch.float64)), weights


@dataclass(frozen=True, kw_only=True)
class ARC(Tolerant):
    """Shortens the floor(2f (n - f) / n) longest rows to the length of the next one; a row not finite becomes zero.

    f <= n is needed.
    """

    name: ClassVar[str] = "arc"

    def __call__(self, v: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        n = v.shape[0]
        if self.f > n:
            raise TooFewRows(f"arc needs at least f={self.f} rows, got n={n}; lower f or wait for more rows")
        length = lengths(v).nan_to_num_(nan=torch.inf, posinf=torch.inf)
        num_longest = 2 * self.f * (n - self.f) // n
        return _shorten(v, length, length.sort().values[n - num_longest - 1]), weights


@dataclass(frozen=True)
class Prepared:
    """An aggregator behind pre-aggregators, which prepare the rows in this order; it needs all rows at once.

    Args:
        first: pre-aggregators.
        rule: the aggregator.
        rng: for those of them that draw.

    >>> rule = Prepared((Clipping(norm=1.0),), lambda v, weights: v.mean(0), np.random.default_rng(0))
    >>> rule(torch.tensor([[0.5], [3.0]]), torch.ones(2))
    tensor([0.7500])
    """

    first: Sequence[PreAggregator]
    rule: Aggregator
    rng: np.random.Generator
    foldable: ClassVar[bool] = False

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        for prepare in self.first:
            v, weights = prepare(v, weights, self.rng)
        return self.rule(v, weights)


def prepared(first: Sequence[PreAggregator] | None, rule: Aggregator, rng: np.random.Generator) -> Aggregator:
    """The aggregator itself where nothing comes before it, so that a linear rule still folds."""
    return Prepared(first, rule, rng) if first else rule


def _shorten(v: Tensor, length: Tensor, limit: Tensor) -> Tensor:
    ok = finite_rows(v)
    factor = torch.where(length > limit, limit / length, 1.0)
    return without_bad(v, ok) * factor[:, None].to(v.dtype)
