"""Rules that look at who is near whom: nearest-neighbour averaging, Krum, Multi-Krum.

NNA: Farhadkhani et al. Robust collaborative learning with linear gradient overhead (MoNNA). ICML 2023. Krum: Blanchard
et al. Machine learning with adversaries: Byzantine tolerant gradient descent. NeurIPS 2017.

Letters: R or n rows, C pivots, M rows sent, P entries of a row, f rows that may be faulty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim.aggregate.base import Robust, finite_rows, without_bad
from fedsim.aggregate.distances import FAR, distances_along, squared_distances
from fedsim.graph import Graph, everybody


def nearest_neighbour_average(pivot: Tensor, sent: Tensor, heard: Graph, keep: int | Tensor) -> Tensor:
    """Average the `keep` heard vectors nearest to each pivot (MoNNA, NNA rule).

    A pivot that was sent and heard is at distance 0 from itself and counts as one of the `keep`. A vector with a NaN or
    an infinity is the farthest of those heard; a pivot that must take one, or is one itself, gets nothing finite.

    Args:
        pivot: [C, P], each client's own vector.
        sent: [M, P], every vector sent, the clients' own among them.
        heard: which of them reached which client.
        keep: how many to average, perhaps for each client [C]; ties go to the lower row.

    Returns:
        [C, P].

    Raises:
        ValueError: if keep < 1 or some client heard fewer than `keep`.

    >>> heard = everybody(3).rows(torch.tensor([0]))
    >>> nearest_neighbour_average(torch.tensor([[0.]]), torch.tensor([[0.], [1.], [9.]]), heard, 2)
    tensor([[0.5000]])
    """
    keep = torch.as_tensor(keep, device=sent.device).expand(len(heard))
    if bool((keep < 1).any()):
        raise ValueError(f"keep={int(keep.min())} must be at least 1: f is too large for the vectors a client heard")
    spare = heard.counts - keep
    if bool((spare < 0).any()):
        at = int(spare.argmin())
        raise ValueError(
            f"keep={int(keep[at])} exceeds the {int(heard.counts[at])} vectors a client heard; lower f or wait for more"
        )
    each, count = torch.ones_like(heard.weights), keep[:, None]
    if not bool(spare.any()):  # everyone is kept: the plain mean, whatever the distances
        return replace(heard, weights=each).mix(sent).div_(count)
    near = heard.ranks(distances_along(heard, pivot, sent)) < keep[heard.hearers]
    return heard.chosen(near, each).mix(sent).div_(count).masked_fill_(~finite_rows(pivot)[:, None], torch.nan)


def _average(v: Tensor, chosen: Tensor, ok: Tensor | None = None) -> Tensor:
    """Mean of the chosen rows [C, k] of v [M, P] as one product with a 0/1 matrix; NaN where a bad row is chosen."""
    ok_v = finite_rows(v)
    member = v.new_zeros(chosen.shape[0], v.shape[0]).scatter_(1, chosen, 1.0)
    out = (member @ without_bad(v, ok_v)).div_(chosen.shape[1])
    good = ok_v[chosen].all(dim=1)
    return out.masked_fill_(~(good if ok is None else good & ok)[:, None], torch.nan)


@dataclass(frozen=True, kw_only=True)
class NNA(Robust):
    """Mean of the n - f rows nearest to one trusted row. The trusted row counts; weights do not.

    Args:
        pivot: the trusted row.
    """

    name: ClassVar[str] = "nna"
    pivot: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivot < 0:
            raise ValueError(f"nna.pivot must be a row, at least 0, got {self.pivot}")

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        n = v.shape[0]
        self.check(n)
        if self.pivot >= n:
            raise ValueError(f"nna.pivot={self.pivot} is not one of the {n} rows 0..{n - 1}")
        heard = everybody(n).rows(torch.tensor([self.pivot])).to(v.device)
        return nearest_neighbour_average(v[self.pivot : self.pivot + 1], v, heard, n - self.f)[0]


@dataclass(frozen=True, kw_only=True)
class Krum(Robust):
    """The row whose nearest others are nearest, the first of equal ones. Weights do not count.

    Args:
        neighbours: how many others a row is scored by; the paper's n - f - 2 leaves out one more.
    """

    name: ClassVar[str] = "krum"
    neighbours: Literal["n-f-1", "n-f-2"] = "n-f-1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours not in ("n-f-1", "n-f-2"):
            raise ValueError(f"krum.neighbours must be n-f-1 or n-f-2, got {self.neighbours!r}")

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        spared = 1 if self.neighbours == "n-f-1" else 2
        return v[int(krum_scores(squared_distances(v, v), self.f, spared).argmin())].clone()


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Robust):
    """Mean of the n - f rows with the best Krum scores (n - f - 1 neighbours). Weights do not count."""

    name: ClassVar[str] = "multi_krum"

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        self.check(v.shape[0])
        scores = krum_scores(squared_distances(v, v), self.f, 1)
        return _average(v, scores.argsort(stable=True)[None, : v.shape[0] - self.f])[0]


def krum_scores(distances: Tensor, f: int, spared: int) -> Tensor:
    """[n] mean squared distance of each row to its n - f - spared nearest others; at least one of them."""
    n = distances.shape[0]
    if n == 1:
        return distances.new_zeros(1)
    others = distances.clone().fill_diagonal_(-1.0).sort(dim=1).values[:, 1:]
    count = max(1, n - f - spared)
    nearest = others[:, :count]
    return (nearest.clamp(max=FAR / n)).mean(dim=1)


def mix_with_neighbours(v: Tensor, f: int) -> Tensor:
    """[R, P]: each row replaced by the mean of the R - f rows nearest to it, itself included; ties to the lower row."""
    order = squared_distances(v, v).argsort(dim=1, stable=True)[:, : v.shape[0] - f]
    return _average(v, order, finite_rows(v))
