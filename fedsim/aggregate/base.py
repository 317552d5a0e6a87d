"""What aggregation rules share; a rule takes R rows and their weights and gives one vector (`fedsim.fleet.Aggregator`).

Letters: R rows, P entries of a row, f rows that may be faulty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import TooFewRows

LONGEST = 1e150
"""Entries from here on count as infinite: a million squares of differences of smaller ones can be added up."""


class PreAggregator(Protocol):
    """Frozen settings of a rule that prepares rows for an aggregator, without changing its input."""

    def __call__(self, v: Tensor, weights: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Rows [R, P] and weights [R] -> rows [R', P] and weights [R']."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tolerant:
    """A rule that takes some of its rows for faulty.

    Args:
        f: rows that may be faulty, at least 0.
    """

    f: int
    name: ClassVar[str]
    """What messages call it: its row of the table."""

    def __post_init__(self) -> None:
        if self.f < 0:
            raise ValueError(f"{self.name}.f must be a number of rows, at least 0, got {self.f}")


@dataclass(frozen=True, kw_only=True)
class Robust(Tolerant):
    """An aggregator of n rows, more than 2f unless it says otherwise, whose weights do not count."""

    foldable: ClassVar[bool] = False

    def check(self, n: int) -> None:
        """Refuse n rows of which half or more may be faulty.

        Raises:
            TooFewRows: if n <= 2f.
        """
        if n <= 2 * self.f:
            raise TooFewRows(
                f"{self.name} needs more than 2f = {2 * self.f} rows for f={self.f}, got n={n}; lower f or wait for "
                "more rows"
            )


def finite_rows(v: Tensor) -> Tensor:
    """[R] bool: rows without a NaN or an infinity, nor a number whose square would be none in float64."""
    ok = v.sum(dim=1).isfinite()
    doubtful = (~ok).nonzero()[:, 0]  # bad, or so large that the sum overflows
    if doubtful.numel():
        ok[doubtful] = v[doubtful].isfinite().all(dim=1)
    if v.dtype == torch.float64 and v.numel():
        low, high = v.aminmax(dim=1)
        ok &= (low > -LONGEST) & (high < LONGEST)
    return ok


def numbers_at_once(device: torch.device) -> int:
    """How many float64 numbers to work on at a time: on a CPU they stay in its cache, elsewhere they take 256 MiB."""
    return 1 << 18 if device.type == "cpu" else 1 << 25


def lengths(v: Tensor) -> Tensor:
    """[R] float64: Euclidean length of each row, summed in float64; NaN or infinity for a row that is not finite."""
    squares = v.new_zeros(v.shape[0], dtype=torch.float64)
    for part in v.split(max(256, numbers_at_once(v.device) // max(1, v.shape[0])), dim=1):
        wide = part.to(torch.float64)
        squares += torch.linalg.vecdot(wide, wide)
    return squares.sqrt()


def without_bad(v: Tensor, ok: Tensor) -> Tensor:
    """v with the rows that are not ok set to zero, so that a product with weight zero leaves no NaN behind."""
    return v if bool(ok.all()) else torch.where(ok[:, None], v, 0.0)
