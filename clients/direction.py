"""Directions: how a client half changes a gradient before it steps, written as the paper writes it.

`beta * (GRADIENT - c_i + c) + (1 - beta) * m` is an affine map of the gradient: one scale and one shift, so that it
costs one pass over the stack (or none, inside a fused step) however many terms it has. `gradient_at(w)` stands for
the gradient of the same minibatch at another point, as variance reduction needs it.

Letters: C clients of a stack, k of them still stepping, P entries; y the local model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """u = scale * g(y) + other_scale * g(other) + shift.

    Args:
        scale: of the gradient at the local model.
        shift: [P], or [C, P] with one row per client of the stack, or None for zero.
        other: [P], the second point, or None.
        other_scale: of the gradient there.

    >>> import torch
    >>> u = 0.5 * (GRADIENT - torch.tensor([[1.0], [3.0]])) + 2.0 * torch.tensor([1.0])
    >>> u.scale, u.shift
    (0.5, tensor([[1.5000], [0.5000]]))
    """

    scale: float = 1.0
    shift: Tensor | None = None
    other: Tensor | None = None
    other_scale: float = 0.0

    def rows(self, k: int) -> Tensor | None:
        """The shift of the first k clients."""
        return self.shift if self.shift is None or self.shift.ndim == 1 else self.shift[:k]

    def __add__(self, term: Tensor | Affine) -> Affine:
        if not isinstance(term, Affine):
            term = Affine(0.0, term)
        if self.other is not None and term.other is not None and self.other is not term.other:
            raise ValueError("a direction may look at one other point only")
        other = self.other if self.other is not None else term.other
        shift = term.shift if self.shift is None else self.shift if term.shift is None else self.shift + term.shift
        return Affine(self.scale + term.scale, shift, other, self.other_scale + term.other_scale)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Affine:
        shift = None if self.shift is None else self.shift * factor
        return Affine(self.scale * factor, shift, self.other, self.other_scale * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Affine:
        return self * -1.0

    def __sub__(self, term: Tensor | Affine) -> Affine:
        return self + -term

    def __rsub__(self, term: Tensor) -> Affine:
        return -self + term


GRADIENT = Affine()
"""The gradient of the client's minibatch at its local model."""


def gradient_at(point: Tensor) -> Affine:
    """The gradient of the same minibatch at `point` [P]."""
    return Affine(0.0, None, point, 1.0)
