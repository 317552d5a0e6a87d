"""Rules that average the most compact n - f rows: MDA, MVA, SMEA; and CAF, which weighs rows down instead.

MDA: El Mhamdi, Guerraoui, Guirguis, Hoang, Rouault. Genuinely distributed Byzantine machine learning. PODC 2020.
SMEA, CAF: Allouah et al. as implemented in ByzFL. Departures: SMEA and CAF there estimate the top eigenvector by one
step from a random start; here it is exact, from the n x n products of the rows, so no random number is needed. In CAF
there a row of weight zero still sets the scale by which the others lose theirs, so that one row far away keeps the
search going almost for ever; here only rows that have a weight do.

All work on the squared distances between rows, whose double centring gives the products: K = -1/2 J D J.

Letters: n rows, P entries of a row, f rows that may be faulty, k = n - f rows kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb, inf
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.aggregate.base import Robust, finite_rows, without_bad
from fedsim.aggregate.distances import FAR, squared_distances

_MOST_SUBSETS = {"mva": 5_000_000, "smea": 500_000}  # some ten seconds of work
_BATCH = 1 << 14


@dataclass(frozen=True, kw_only=True)
class MDA(Robust):
    """Mean of the n - f rows of least diameter, the first such set in lexicographic order. Weights do not count.

    Time grows as 2^f.
    """

    name: ClassVar[str] = "mda"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        distances = squared_distances(v, v).cpu().fill_diagonal_(0.0)
        radii = distances.unique().tolist()
        low, high = 0, len(radii) - 1
        while low < high:  # the least radius at which dropping f rows leaves no pair farther apart
            middle = (low + high) // 2
            if _can_drop(_far(distances, radii[middle]), (1 << len(v)) - 1, self.f):
                high = middle
            else:
                low = middle + 1
        return v[_first_to_keep(_far(distances, radii[low]), self.f)].mean(dim=0)


def _far(distances: Tensor, radius: float) -> list[int]:
    """For each row the set of rows farther away than the radius, as the bits of an integer."""
    return [sum(1 << j for j, is_far in enumerate(row) if is_far) for row in (distances > radius).tolist()]


def _can_drop(far: list[int], left: int, f: int) -> bool:
    """Whether dropping f of the rows left leaves no two that are far apart (a vertex cover, by branching)."""
    degrees = {i: (far[i] & left).bit_count() for i in range(len(far)) if left >> i & 1}
    row = max(degrees, key=degrees.__getitem__, default=0)
    most = degrees.get(row, 0)
    if most == 0:
        return True
    if sum(degrees.values()) > 2 * f * most:  # each row dropped settles `most` pairs at best
        return False
    if _can_drop(far, left & ~(1 << row), f - 1):
        return True
    return 1 < most <= f and _can_drop(far, left & ~far[row], f - most)  # the row stays: all far from it go


def _first_to_keep(far: list[int], f: int) -> list[int]:
    """The lexicographically first n - f rows of which no two are far apart; there are some."""
    n, gone = len(far), 0
    kept: list[int] = []
    for row in range(n):
        if gone >> row & 1 or len(kept) == n - f:
            continue
        dropped = gone | far[row]
        spare = f - dropped.bit_count()
        if spare >= 0 and _can_drop(far, (1 << n) - 1 & ~dropped, spare):
            kept.append(row)
            gone = dropped
        else:
            gone |= 1 << row
    return kept


@dataclass(frozen=True, kw_only=True)
class MVA(Robust):
    """Mean of the n - f rows of least variance, found among all such sets. Weights do not count."""

    name: ClassVar[str] = "mva"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        return _mean_of_least(self, v, self._spreads)

    def _spreads(self, distances: Tensor, kept: Tensor) -> Tensor:
        # The sum of squared distances within a set is its variance, times a constant.
        member = torch.zeros(len(kept), len(distances), dtype=torch.float64).scatter_(1, kept, 1.0)
        return ((member @ distances) * member).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class SMEA(Robust):
    """Mean of the n - f rows whose covariance has the least top eigenvalue, among all such sets. No weights."""

    name: ClassVar[str] = "smea"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        return _mean_of_least(self, v, self._spreads)

    def _spreads(self, distances: Tensor, kept: Tensor) -> Tensor:
        within = distances[kept[:, :, None], kept[:, None, :]]
        uniform = torch.full((kept.shape[1],), 1.0 / kept.shape[1], dtype=torch.float64)
        return torch.linalg.eigvalsh(_products(within, uniform))[:, -1]


@dataclass(frozen=True, kw_only=True)
class CAF(Robust):
    """Weighs rows down along their greatest covariance and returns the best mean on the way. No weights from outside.

    It goes on until at most n - 2f of the weight is left; the best mean is that of the least top eigenvalue.
    """

    name: ClassVar[str] = "caf"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        ok = finite_rows(v)
        distances = squared_distances(v, v).cpu().masked_fill_(~(ok[:, None] & ok).cpu(), 0.0)
        c = ok.cpu().to(torch.float64)  # a row infinitely far away is weighed down to 0 first
        if float(c.sum()) < v.shape[0] - self.f:
            return torch.full_like(v[0], torch.nan)
        best, share = inf, c / c.sum()
        while float(c.sum()) > v.shape[0] - 2 * self.f:
            now = c / c.sum()
            products = _products(distances, now)
            root = now.sqrt()
            values, vectors = torch.linalg.eigh(root[:, None] * products * root)
            if float(values[-1]) < best:
                best, share = float(values[-1]), now
            along = (products @ (root * vectors[:, -1])).square() * (c > 0)
            if not float(along.max()) > 0:  # all remaining rows agree
                break
            c = c * (1.0 - along / along.max())
        return share.to(v) @ without_bad(v, ok)


def _products(distances: Tensor, share: Tensor) -> Tensor:
    """[..., n, n] inner products of rows measured from their mixture by `share` [n], from squared distances."""
    to_mean = distances @ share
    centred = distances - to_mean[..., :, None] - to_mean[..., None, :] + (to_mean @ share)[..., None, None]
    return -0.5 * centred


def _mean_of_least(rule: Robust, v: Tensor, spreads: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[P]: mean of the n - f rows of v [n, P] of least spread, given distances [n, n] and sets [S, n - f] as [S]."""
    distances = _bounded(squared_distances(v, v).cpu())
    best, chosen = inf, torch.arange(v.shape[0] - rule.f)
    for kept in _subsets(rule.name, v.shape[0], rule.f):
        spread = spreads(distances, kept)
        least = int(spread.argmin())
        if float(spread[least]) < best:
            best, chosen = float(spread[least]), kept[least]
    return v[chosen.to(v.device)].mean(dim=0)


def _bounded(distances: Tensor) -> Tensor:
    """FAR made small enough to add up, and still farther than everything else."""
    finite = distances[distances < FAR]
    limit = 4.0 * distances.shape[0] ** 2 * float(finite.max()) + 1.0 if finite.numel() else 1.0
    return distances.clamp(max=limit)


def _subsets(rule: str, n: int, f: int) -> Iterator[Tensor]:
    """Batches [S, n - f] int64 of all sets of n - f rows, in lexicographic order."""
    if comb(n, f) > _MOST_SUBSETS[rule]:
        raise ValueError(
            f"{rule} would search {comb(n, f)} sets of {n - f} of n={n} rows, more than {_MOST_SUBSETS[rule]}; "
            f"lower f={f} or take mda, caf or nnm with a mean instead"
        )
    sets = combinations(range(n), n - f)
    while batch := list(islice(sets, _BATCH)):
        yield torch.tensor(batch, dtype=torch.int64)
