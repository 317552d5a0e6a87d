"""Weighted sums of what a stack has anyway: directions of steps, changes of clients and replies are all such sums.

A term is a tensor, vectors kept in factors, or a gradient that is yet to be taken (`fedsim.clients.direction`). Terms
are formed only where somebody needs the vectors themselves; a fold needs each term's own weighted sum, which reads it
once.

Letters: C clients of a stack, P entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

Weight = float | Tensor
"""A number, or one for each client [C] float64."""


class Factors(Protocol):
    """Vectors [C, P] of a stack that are kept in factors."""

    @property
    def dtype(self) -> torch.dtype: ...

    def __len__(self) -> int:
        """C."""
        ...

    def dense(self, weight: Weight) -> Tensor:
        """[C, P], a fresh tensor: the vectors times a weight."""
        ...

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[P]: the sum of weights [C] times the vectors, which need not be formed for it."""
        ...


@dataclass(frozen=True, eq=False)
class Terms:
    """The sum of weight * term.

    Args:
        terms: (weight, term); a tensor is [C, P], or [P] where all clients share it.

    >>> change = Terms.of(torch.tensor([[3.0], [5.0]])) - torch.tensor([1.0])
    >>> change.dense().tolist(), change.weighted_sum(torch.tensor([0.5, 0.5])).tolist()
    ([[2.0], [4.0]], [3.0])
    """

    terms: tuple[tuple[Weight, Any], ...] = ()

    @classmethod
    def of(cls, value: Terms | Tensor | Factors) -> Terms:
        """A value as a sum of one term."""
        return value if isinstance(value, Terms) else cls(((1.0, value),))

    def __add__(self, other: Terms | Tensor) -> Terms:
        return Terms(self.terms + Terms.of(other).terms)

    __radd__ = __add__

    def __mul__(self, factor: Weight) -> Terms:
        return Terms(tuple((weight * factor, term) for weight, term in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Terms:
        return self * -1.0

    def __sub__(self, other: Terms | Tensor) -> Terms:
        return self + -Terms.of(other)

    def __rsub__(self, other: Terms | Tensor) -> Terms:
        return -self + other

    def __len__(self) -> int:
        """C; at least one term must be the clients' own."""
        return next(len(term) for _, term in self.terms if not _shared(term))

    @property
    def dtype(self) -> torch.dtype:
        """Of the sum: that of the most exact term."""
        return reduce(torch.promote_types, (term.dtype for _, term in self.terms))

    def dense(self) -> Tensor:
        """[C, P], or [P] if all terms are shared: a fresh tensor; what all clients share is added up first."""
        out = None
        for weight, term in sorted(self.terms, key=lambda t: not (_shared(t[1]) and isinstance(t[0], float))):
            out = _scaled(weight, term, self.dtype) if out is None else _plus(out, weight, term)
        assert out is not None, "a sum of no terms"
        return out

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """[P]: the sum of weights [C] times the rows; one client's is formed first, to the bits that a device sends."""
        if len(self) == 1:
            (weight, vector), *rest = self.terms
            if not rest and weight == 1.0 and isinstance(vector, Tensor):
                return vector[0] * weights.to(vector)
            return (vector := self.dense())[0].mul_(weights.to(vector))
        out = None
        for weight, term in self.terms:
            total = weights * (weight.to(weights) if isinstance(weight, Tensor) else weight)
            if not isinstance(term, Tensor):
                part = term.weighted_sum(total)
            elif term.ndim > 1:
                part = total.to(term) @ term
            else:
                part = term * total.sum().to(term)
            out = part.to(self.dtype) if out is None else out.add_(part)
        assert out is not None, "a sum of no terms"
        return out


def _shared(term: Any) -> bool:
    return isinstance(term, Tensor) and term.ndim == 1


def _column(weight: Weight, like: Tensor) -> float | Tensor:
    return weight.to(like)[:, None] if isinstance(weight, Tensor) else weight


def _scaled(weight: Weight, term: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(term, Tensor):
        return term.dense(weight).to(dtype)
    term = term.to(dtype)
    return term * _column(weight, term)


def _plus(out: Tensor, weight: Weight, term: Any) -> Tensor:
    if not isinstance(term, Tensor):
        term, weight = term.dense(weight), 1.0
    if isinstance(weight, Tensor):
        part = term * _column(weight, out)
        return part.add_(out) if out.ndim < part.ndim else out.add_(part)
    return torch.add(out, term, alpha=weight, out=out if out.ndim >= term.ndim else None)
