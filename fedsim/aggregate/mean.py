"""The weighted mean, which can be taken stack by stack.

Letters: R rows, P entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """A mean in the making: total [P], the weighted sum of the rows so far; weight [], the sum of their weights."""

    total: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Weighted mean; a NaN in any row shows in the result.

    Args:
        weights: `num_examples`, the weights that the caller gives; `uniform` counts every row once.

    >>> Mean()(torch.tensor([[0.0], [3.0]]), torch.tensor([2.0, 1.0]))
    tensor([1.])
    """

    weights: Literal["num_examples", "uniform"] = "num_examples"
    foldable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights not in ("num_examples", "uniform"):
            raise ValueError(f"mean.weights must be num_examples or uniform, got {self.weights!r}")

    def __call__(self, v: Tensor, weights: Tensor) -> Tensor:
        return self.finish(self.fold(None, v, weights))

    def weigh(self, num_examples: Tensor) -> Tensor:
        """[R] float64 weights that sum to one, from sample counts [R].

        Raises:
            ValueError: if there are no rows, a count is negative, or all are zero.
        """
        w = self._raw(num_examples).to(torch.float64)
        total = w.sum()
        if not bool(total > 0) or bool((w < 0).any()):
            raise ValueError(f"mean needs weights that are not negative and not all zero, got {num_examples.tolist()}")
        return w / total

    def fold(self, partial: Partial | None, v: Tensor, weights: Tensor) -> Partial:
        """Add rows [C, P] with weights [C] to a partial mean; None is the empty one."""
        w = self._raw(weights).to(v)
        part = Partial(w @ v, w.sum())
        return part if partial is None else self.merge(partial, part)

    def merge(self, a: Partial, b: Partial) -> Partial:
        """The partial mean of the rows of both."""
        return Partial(a.total + b.total, a.weight + b.weight)

    def finish(self, partial: Partial) -> Tensor:
        """The mean [P].

        Raises:
            ValueError: if the weights do not add up to a positive number.
        """
        if not bool(partial.weight > 0):
            raise ValueError(f"mean needs weights that sum to a positive number, got {float(partial.weight)}")
        return partial.total / partial.weight

    def _raw(self, weights: Tensor) -> Tensor:
        return weights if self.weights == "num_examples" else torch.ones_like(weights)
