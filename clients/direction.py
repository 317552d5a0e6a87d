"""Directions: how a client half changes a gradient before it steps, written as the paper writes it.

`beta * (GRADIENT - c_i + c) + (1 - beta) * m` is a sum of terms, some of which are gradients yet to be taken: at the
local model, or with `gradient_at(w)` at another point on the same minibatch, as variance reduction needs it. So it
costs one pass over the stack (or none, inside a fused step) however many terms it has.

Letters: C clients of a stack, k of them still stepping, P entries; y the local model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from fedsim.terms import Terms


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradient of the client's minibatch at `point` [P], or at its local model where that is None."""

    point: Tensor | None = None


GRADIENT = Terms(((1.0, Gradient()),))
"""The gradient of the client's minibatch at its local model."""


def gradient_at(point: Tensor) -> Terms:
    """The gradient of the same minibatch at `point` [P]."""
    return Terms(((1.0, Gradient(point)),))


@dataclass(frozen=True, eq=False)
class Direction:
    """u = scale * g(y) + other_scale * g(other) + shift.

    Args:
        scale: of the gradient at the local model.
        terms: (weight, tensor) of the shift; tensors are [P], or [C, P] with one row per client of the stack.
        other: [P], the second point, or None.
        other_scale: of the gradient there.

    >>> import torch
    >>> u = Direction.of(0.5 * (GRADIENT - torch.tensor([[1.0], [3.0]])) + 2.0 * torch.tensor([1.0]))
    >>> u.scale, u.shift
    (0.5, tensor([[1.5000], [0.5000]]))
    """

    scale: float
    terms: tuple[tuple[float, Tensor], ...]
    other: Tensor | None
    other_scale: float

    @classmethod
    def of(cls, u: Terms) -> Direction:
        """What a sum of terms asks of a step.

        Raises:
            ValueError: if it looks at more than one other point, or a weight is not one number.
        """
        scale, other_scale, other = 0.0, 0.0, None
        tensors = []
        for weight, term in u.terms:
            if not isinstance(weight, float | int):
                raise ValueError("a direction's weights are numbers, the same for all clients of a stack")
            if not isinstance(term, Gradient):
                tensors.append((float(weight), term))
            elif term.point is None:
                scale += weight
            elif other is None or other is term.point:
                other, other_scale = term.point, other_scale + weight
            else:
                raise ValueError("a direction may look at one other point only")
        return cls(scale, tuple(tensors), other, other_scale)

    @cached_property
    def shift(self) -> Tensor | None:
        """[P] or [C, P], or None for zero."""
        return Terms(self.terms).dense() if self.terms else None

    def rows(self, k: int) -> Tensor | None:
        """The shift of the first k clients."""
        return self.shift if self.shift is None or self.shift.ndim == 1 else self.shift[:k]
