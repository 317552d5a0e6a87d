"""Rules that seek a centre by small steps: the geometric median and centred clipping.

Geometric median: smoothed Weiszfeld iteration, Pillutla, Kakade, Harchaoui. Robust aggregation for federated learning.
arXiv:1912.13445. Centred clipping: Karimireddy, He, Jaggi. Learning from history for Byzantine robust optimization.
ICML 2021.

Letters: R rows, P entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.aggregate.base import finite_rows, lengths, without_bad
from fedsim.aggregate.distances import centred_products
from fedsim.fleet import Aggregator


@dataclass(frozen=True, kw_only=True)
class GeometricMedian:
    """The point with the least sum of distances to the rows, smoothed near a row. Weights do not count.

    z <- sum_i v_i / max(nu, |v_i - z|) / sum_i 1 / max(nu, |v_i - z|), starting from z = 0. Three iterations, a common
    setting, are far from converged. Every z but the first is a mixture of the rows, so the iterations run on the R^2
    products of the rows, which are read twice, however many iterations there are.

    Args:
        nu: distances below it count as it.
        iterations: at most.
        tol: stop when no row's share of the mixture moves by more than this.
    """

    nu: float = 0.1
    iterations: int = 1000
    tol: float = 1e-10
    foldable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.nu > 0:
            raise ValueError(f"geometric_median.nu must be a positive distance, got {self.nu}")
        if self.iterations < 1:
            raise ValueError(f"geometric_median.iterations must be at least 1, got {self.iterations}")
        if not self.tol >= 0:
            raise ValueError(f"geometric_median.tol must not be negative, got {self.tol}")

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        ok = finite_rows(v)
        if not bool(ok.any()):
            return torch.full_like(v[0], torch.nan)
        rows = v if bool(ok.all()) else v[ok]  # a row infinitely far away has the share 0
        products = centred_products(rows).cpu()  # R x R numbers, and many short steps: not work for a GPU
        return self._shares(lengths(rows).cpu(), products).to(v) @ rows

    def _shares(self, from_zero: Tensor, products: Tensor) -> Tensor:
        """[R] float64: the final z as a mixture of the rows."""
        share = self._step(from_zero)
        for _ in range(self.iterations - 1):
            with_z = products @ share  # <v_i, z>, both from the centre of the products
            squared = products.diagonal() - 2.0 * with_z + share @ with_z
            before, share = share, self._step(squared.clamp_(min=0.0).sqrt())
            if float((share - before).abs().max()) <= self.tol:
                break
        return share

    def _step(self, distances: Tensor) -> Tensor:
        pull = 1.0 / distances.clamp(min=self.nu)
        return pull / pull.sum()


@dataclass(frozen=True, kw_only=True)
class CenteredClipping:
    """Moves a start point by the mean of the rows' differences to it, each cut to length tau. Weights do not count.

    The start is the last round's result, which a server keeps (`started`). A row that is not finite does not move the
    point.

    Args:
        tau: greatest length of a difference.
        iterations: moves a call.
    """

    tau: float = 100.0
    iterations: int = 1
    foldable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"centered_clipping.tau must be a positive length, got {self.tau}")
        if self.iterations < 1:
            raise ValueError(f"centered_clipping.iterations must be at least 1, got {self.iterations}")

    def __call__(self, v: Tensor, weights: Tensor, start: Tensor | None = None) -> Tensor:
        """Rows [R, P], weights [R] (ignored) and start [P], zero if None -> [P]."""
        ok = finite_rows(v)
        rows = without_bad(v, ok)
        z = torch.zeros_like(v[0]) if start is None else start
        for _ in range(self.iterations):
            difference = rows - z
            factor = torch.where(ok, (self.tau / lengths(difference)).clamp(max=1.0), 0.0).to(v.dtype)
            z = z + factor @ difference / v.shape[0]
        return z


@dataclass(frozen=True)
class Started:
    """Centred clipping from a start point [P]."""

    rule: CenteredClipping
    start: Tensor
    foldable: ClassVar[bool] = False

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        return self.rule(v, weights, self.start)


def started(rule: Aggregator, start: Tensor | None) -> Aggregator:
    """A rule that begins at the last round's result, if it is one that begins anywhere."""
    return Started(rule, start) if isinstance(rule, CenteredClipping) and start is not None else rule
