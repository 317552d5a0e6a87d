"""Directions: how a client half changes a gradient before the optimizer sees it, written as the paper writes it.

`beta * (GRADIENT - c_i + c) + (1 - beta) * m` is an affine map of the gradient, kept as one scale and one shift, so
that it costs one pass over the stack (or none, inside a fused step) however many terms it has.

Letters: C clients of a stack, k of them still stepping, P entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """u = scale * g + shift.

    Args:
        scale: a number.
        shift: [P], or [C, P] with one row per client of the stack, or None for zero.

    >>> import torch
    >>> u = 0.5 * (GRADIENT - torch.tensor([[1.0], [3.0]])) + 2.0 * torch.tensor([1.0])
    >>> u(torch.tensor([[4.0]]))
    tensor([[3.5000]])
    """

    scale: float = 1.0
    shift: Tensor | None = None

    def __call__(self, g: Tensor) -> Tensor:
        """u [k, P] for the gradients g [k, P] of the first k clients."""
        u = g if self.scale == 1.0 else g * self.scale
        return u if self.shift is None else u + self.rows(len(g))

    def rows(self, k: int) -> Tensor | None:
        """The shift of the first k clients."""
        return self.shift if self.shift is None or self.shift.ndim == 1 else self.shift[:k]

    def __add__(self, other: Tensor) -> Affine:
        return Affine(self.scale, other if self.shift is None else self.shift + other)

    def __sub__(self, other: Tensor) -> Affine:
        return Affine(self.scale, -other if self.shift is None else self.shift - other)

    def __mul__(self, factor: float) -> Affine:
        return Affine(self.scale * factor, None if self.shift is None else self.shift * factor)

    __rmul__ = __mul__


GRADIENT = Affine()
