"""Weighted sums of tensors that a client half has anyway, as replies: formed only where a reply must stand alone.

A fold needs nothing but each tensor's own weighted sum, which reads it once. What a control variate changes by
(c_i' - c_i) and what a corrected run arrives at (a sum of gradients and corrections) are such replies.

Letters: C clients of a stack, P entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

Weight = float | Tensor
"""A number, or one for each client [C] float64."""


@dataclass(frozen=True, eq=False)
class Combination:
    """The sum of weight * tensor over some terms; a `Factored` reply.

    Args:
        terms: (weight, tensor); tensors are [C, P], or [P] where all clients share one. The first is [C, P].

    >>> change = Combination.of((1.0, torch.tensor([[3.0], [5.0]])), (-1.0, torch.tensor([1.0])))
    >>> change.dense().tolist(), change.weighted_sum(torch.tensor([0.5, 0.5])).tolist()
    ([[2.0], [4.0]], [3.0])
    """

    terms: tuple[tuple[Weight, Tensor], ...]

    @classmethod
    def of(cls, *terms: tuple[Weight, Tensor]) -> Combination:
        """The sum of the terms, in any order, at least one of them [C, P]."""
        return cls(tuple(sorted(terms, key=lambda term: -term[1].ndim)))

    def __len__(self) -> int:
        return len(self.terms[0][1])

    def __mul__(self, factor: Weight) -> Combination:
        return Combination(tuple((weight * factor, tensor) for weight, tensor in self.terms))

    def dense(self) -> Tensor:
        """[C, P]."""
        out = torch.zeros_like(self.terms[0][1], dtype=self.dtype)
        for weight, tensor in self.terms:
            out += tensor * (weight.to(out)[:, None] if isinstance(weight, Tensor) else weight)
        return out

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[P]: the sum of weights [C] times the rows; one client's is formed first, to the bits that a device sends."""
        if len(self) == 1:
            vector = self.dense()
            return torch.tensordot(weights.to(vector), vector, dims=1)
        out = torch.zeros_like(self.terms[0][1][0], dtype=self.dtype)
        for weight, tensor in self.terms:
            total = weights * (weight.to(weights) if isinstance(weight, Tensor) else weight)
            out += total.to(tensor) @ tensor if tensor.ndim > 1 else tensor * float(total.sum())
        return out

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum: that of the most exact term."""
        return reduce(torch.promote_types, (tensor.dtype for _, tensor in self.terms))
