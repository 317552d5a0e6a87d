"""Directions: how a client half changes a gradient before it steps, written as the paper writes it.

`beta * (GRADIENT - c_i + c) + (1 - beta) * m` is an affine map of the gradient: one scale and one shift, so that it
costs one pass over the stack (or none, inside a fused step) however many terms it has. `gradient_at(w)` stands for
the gradient of the same minibatch at another point, as variance reduction needs it.

Letters: C clients of a stack, k of them still stepping, P entries; y the local model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """u = scale * g(y) + other_scale * g(other) + shift, the shift being a weighted sum of tensors.

    Args:
        scale: of the gradient at the local model.
        terms: (weight, tensor) of the shift; tensors are [P], or [C, P] with one row per client of the stack.
        other: [P], the second point, or None.
        other_scale: of the gradient there.

    >>> import torch
    >>> u = 0.5 * (GRADIENT - torch.tensor([[1.0], [3.0]])) + 2.0 * torch.tensor([1.0])
    >>> u.scale, u.shift
    (0.5, tensor([[1.5000], [0.5000]]))
    """

    scale: float = 1.0
    terms: tuple[tuple[float, Tensor], ...] = ()
    other: Tensor | None = None
    other_scale: float = 0.0

    @cached_property
    def shift(self) -> Tensor | None:
        """[P] or [C, P], or None for zero; what all clients share is added up first, so each stack costs one pass."""
        out = None
        for weight, term in sorted(self.terms, key=lambda t: t[1].ndim):
            out = term * weight if out is None else torch.add(out, term, alpha=weight)
        return out

    def rows(self, k: int) -> Tensor | None:
        """The shift of the first k clients."""
        return self.shift if self.shift is None or self.shift.ndim == 1 else self.shift[:k]

    def __add__(self, term: Tensor | Affine) -> Affine:
        if not isinstance(term, Affine):
            term = Affine(0.0, ((1.0, term),))
        if self.other is not None and term.other is not None and self.other is not term.other:
            raise ValueError("a direction may look at one other point only")
        other = self.other if self.other is not None else term.other
        return Affine(self.scale + term.scale, self.terms + term.terms, other, self.other_scale + term.other_scale)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Affine:
        terms = tuple((weight * factor, term) for weight, term in self.terms)
        return Affine(self.scale * factor, terms, self.other, self.other_scale * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Affine:
        return self * -1.0

    def __sub__(self, term: Tensor | Affine) -> Affine:
        return self + (-term if isinstance(term, Affine) else Affine(0.0, ((-1.0, term),)))

    def __rsub__(self, term: Tensor) -> Affine:
        return -self + term


GRADIENT = Affine()
"""The gradient of the client's minibatch at its local model."""


def gradient_at(point: Tensor) -> Affine:
    """The gradient of the same minibatch at `point` [P]."""
    return Affine(0.0, (), point, 1.0)
