"""What an aggregator is: R rows and their weights in, one vector out.

Letters: R rows, P entries of a row, f rows that may be faulty.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor


class TooFewRows(ValueError):
    """A rule got fewer rows than it can judge."""


class Aggregator(Protocol):
    """Frozen settings of an aggregation rule. Rules never change their input.

    A rule that is not linear counts every row once, whatever its weight: a weight is what a client says about itself,
    and a robust rule that believed it would not be robust. Such a rule takes a row with a NaN or an infinity to be
    farther away than any other row.
    """

    foldable: ClassVar[bool]
    """Whether the rule is linear, so that stacks can be folded as they finish."""

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        """Rows [R, P] and weights [R] -> [P]."""
        ...


class PreAggregator(Protocol):
    """Frozen settings of a rule that prepares rows for an aggregator, without changing its input."""

    def __call__(self, v: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Rows [R, P] and weights [R] -> rows [R', P] and weights [R']."""
        ...


def check_f(rule: str, f: int) -> None:
    """Refuse a negative number of faulty rows."""
    if f < 0:
        raise ValueError(f"{rule}.f must be a number of rows, at least 0, got {f}")


def check_majority(rule: str, n: int, f: int) -> None:
    """Refuse n rows of which half or more may be faulty."""
    if n <= 2 * f:
        raise TooFewRows(
            f"{rule} needs more than 2f = {2 * f} rows for f={f}, got n={n}; lower f or wait for more rows"
        )


def finite_rows(v: Tensor) -> Tensor:
    """[R] bool: rows without a NaN or an infinity."""
    ok = v.sum(dim=1).isfinite()
    doubtful = (~ok).nonzero()[:, 0]  # bad, or so large that the sum overflows
    if doubtful.numel():
        ok[doubtful] = v[doubtful].isfinite().all(dim=1)
    return ok


def lengths(v: Tensor) -> Tensor:
    """[R] float64: Euclidean length of each row, summed in float64; NaN or infinity for a row that is not finite."""
    squares = v.new_zeros(v.shape[0], dtype=torch.float64)
    for part in v.split(max(256, (1 << 18) // max(1, v.shape[0])), dim=1):  # a part stays in the cache
        wide = part.to(torch.float64)
        squares += torch.linalg.vecdot(wide, wide)
    return squares.sqrt()


def without_bad(v: Tensor, ok: Tensor) -> Tensor:
    """v with the rows that are not ok set to zero, so that a product with weight zero leaves no NaN behind."""
    return v if bool(ok.all()) else torch.where(ok[:, None], v, 0.0)
