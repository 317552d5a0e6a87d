"""Rules that treat every coordinate alone: median, trimmed mean, MeaMed, Phocas, and Bulyan's last step.

Median and trimmed mean: Yin et al. arXiv:1803.01498. MeaMed: Xie, Koyejo, Gupta. Generalized Byzantine-tolerant SGD.
arXiv:1802.10116. Phocas: the same authors, arXiv:1805.09682. Bulyan: El Mhamdi, Guerraoui, Rouault. ICML 2018.
All start from the sorted columns, so they do not depend on the order of the rows. NaN is sorted above infinity.

Letters: R or n rows, P entries of a row, f rows that may be faulty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.aggregate.base import Robust
from fedsim.aggregate.distances import FAR, squared_distances
from fedsim.aggregate.neighbours import krum_scores
from fedsim.fleet import TooFewRows


@dataclass(frozen=True, kw_only=True)
class Median:
    """Median of every coordinate, the mean of the middle two of an even number. Weights do not count."""

    foldable: ClassVar[bool] = False

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        return _median(sort_columns(v))


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Robust):
    """Mean of every coordinate without its f lowest and f highest values. Weights do not count."""

    name: ClassVar[str] = "trimmed_mean"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        return _trimmed(sort_columns(v), self.f)


@dataclass(frozen=True, kw_only=True)
class MeaMed(Robust):
    """Mean of the n - f values of every coordinate nearest to its median. Weights do not count."""

    name: ClassVar[str] = "meamed"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        columns = sort_columns(v)
        return _mean_around(columns, _median(columns), v.shape[0] - self.f)


@dataclass(frozen=True, kw_only=True)
class Phocas(Robust):
    """Mean of the n - f values of every coordinate nearest to its trimmed mean. Weights do not count."""

    name: ClassVar[str] = "phocas"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        columns = sort_columns(v)
        return _mean_around(columns, _trimmed(columns, self.f), v.shape[0] - self.f)


@dataclass(frozen=True, kw_only=True)
class Bulyan(Robust):
    """Krum's choice n - 2f times without replacement, then the n - 4f values nearest to the median. No weights.

    Two rows that are each other's nearest have the same score when few are left: the one nearer to all rows goes first.
    n >= 4f + 3 is needed.
    """

    name: ClassVar[str] = "bulyan"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        n = v.shape[0]
        if n < 4 * self.f + 3:
            raise TooFewRows(f"bulyan needs 4f + 3 = {4 * self.f + 3} rows for f={self.f}, got n={n}; lower f")
        distances, left, chosen = squared_distances(v, v).cpu(), list(range(n)), []
        to_all = distances.clamp(max=FAR / n).sum(dim=1).tolist()
        for _ in range(n - 2 * self.f):
            scores = krum_scores(distances[left][:, left], self.f, 2).tolist()
            _, _, best = min((score, to_all[row], row) for score, row in zip(scores, left, strict=True))
            chosen.append(best)
            left.remove(best)
        columns = sort_columns(v[chosen])
        return _mean_around(columns, _median(columns), n - 4 * self.f)


def sort_columns(v: Tensor) -> Tensor:
    """[R, P]: every column ascending, NaN last."""
    if v.device.type == "cpu":  # numpy's vectorised sort is several times faster
        return torch.from_numpy(np.sort(v.detach().numpy(), axis=0))
    return v.sort(dim=0).values


def _median(columns: Tensor) -> Tensor:
    n = columns.shape[0]
    low, high = columns[(n - 1) // 2], columns[n // 2]
    return low.clone() if n % 2 else (low + high) / 2


def _trimmed(columns: Tensor, f: int) -> Tensor:
    return columns[f : columns.shape[0] - f].mean(dim=0)


def _mean_around(columns: Tensor, centre: Tensor, keep: int) -> Tensor:
    """[P]: mean of the `keep` values of each sorted column nearest to `centre`; ties go to the lower values."""
    # The nearest values stand side by side, so of two values `keep` apart one at most is among them: the nearer one.
    # The lower one goes while it is farther, and never for a NaN.
    first = (centre - columns[: len(columns) - keep] > columns[keep:] - centre).sum(dim=0)
    row = torch.arange(len(columns), device=columns.device)[:, None]
    return torch.where((row >= first) & (row < first + keep), columns, 0.0).sum(dim=0) / keep
