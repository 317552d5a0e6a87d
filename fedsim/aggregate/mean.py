"""The weighted mean, which a fleet can take stack by stack.

Letters: R rows, P entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


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
        """[P]: the mean of rows [R, P].

        Raises:
            ValueError: if the weights do not add up to a positive number.
        """
        w = self._raw(weights).to(v)
        total = w.sum()
        if not bool(total > 0):
            raise ValueError(f"mean needs weights that sum to a positive number, got {float(total)}")
        return (w @ v).div_(total)

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

    def _raw(self, weights: Tensor) -> Tensor:
        return weights if self.weights == "num_examples" else torch.ones_like(weights)
