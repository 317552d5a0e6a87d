"""Directions: how a client half changes a gradient before it steps, written as the paper writes it.

`beta * (GRADIENT - c_i + c) + (1 - beta) * m` is a sum of terms, some of which are gradients yet to be taken: at the
local model, or with `gradient_at(w)` at another point on the same minibatch, as variance reduction needs it. `MODEL` is
the local model itself, for pulls as in `GRADIENT + mu * (MODEL - x)`. So a direction costs one pass over the stack (or
none, inside a fused step) however many terms it has.

A pull is part of the gradient: an optimizer clips, preconditions and accumulates it together with g. What it asks of
the task beside gradients (losses, curvature, sums clipped sample by sample) is about the client's own loss alone.

Letters: C clients of a stack, k of them still stepping, P entries; y the local model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
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


class Model:
    """The client's local model y at the step."""


MODEL = Terms(((1.0, Model()),))
"""The local model y, at which the gradient is taken; its entries for buffers count as zero."""


@dataclass(frozen=True, eq=False)
class Direction:
    """u = scale * g(y) + pull * y + other_scale * g(other) + shift.

    Args:
        scale: of the gradient at the local model.
        pull: of the local model itself.
        terms: (weight, tensor) of the shift; tensors are [P], or [C, P] with one row per client of the stack.
        other: [P], the second point, or None.
        other_scale: of the gradient there.

    >>> import torch
    >>> u = Direction.of(0.5 * (GRADIENT - torch.tensor([[1.0], [3.0]])) + 2.0 * torch.tensor([1.0]))
    >>> u.scale, u.shift
    (0.5, tensor([[1.5000], [0.5000]]))
    """

    scale: float
    pull: float
    terms: tuple[tuple[float, Tensor], ...]
    other: Tensor | None
    other_scale: float

    @classmethod
    def of(cls, u: Terms) -> Direction:
        """What a sum of terms asks of a step.

        Raises:
            ValueError: if it looks at more than one other point, or a weight is not one number.
        """
        scale, pull, other_scale, other = 0.0, 0.0, 0.0, None
        tensors = []
        for weight, term in u.terms:
            if not isinstance(weight, float | int):
                raise ValueError("a direction's weights are numbers, the same for all clients of a stack")
            if not weight:
                continue
            if isinstance(term, Model):
                pull += weight
            elif not isinstance(term, Gradient):
                tensors.append((float(weight), term))
            elif term.point is None:
                scale += weight
            elif other is None or other is term.point:
                other, other_scale = term.point, other_scale + weight
            else:
                raise ValueError("a direction may look at one other point only")
        return cls(scale, pull, tuple(tensors), other, other_scale)

    @cached_property
    def shift(self) -> Tensor | None:
        """[P] or [C, P], or None for zero."""
        return Terms(self.terms).dense() if self.terms else None

    def beside(self, y: Tensor, spare: Callable[[Tensor], Tensor]) -> Tensor | None:
        """pull * y + shift, [P] or [k, P], or None for zero: what a step takes beside gradients.

        Args:
            y: [k, P], the local models of the first k clients.
            spare: gives a tensor like y to write to, where the sum depends on y.
        """
        shift = self.shift if self.shift is None or self.shift.ndim == 1 else self.shift[: len(y)]
        if not self.pull:
            return shift
        if shift is None:
            return torch.mul(y, self.pull, out=spare(y))
        return torch.add(shift, y, alpha=self.pull, out=spare(y))

    def about(self, x: Tensor) -> tuple[tuple[float, Tensor], ...]:
        """(weight, tensor) of v in u = scale * g + pull * (y - x) + v; a tensor that is x itself cancels exactly.

        Args:
            x: [P] or [C, P], where clients start.
        """
        own = self.pull + sum(weight for weight, term in self.terms if term is x)
        others = tuple((weight, term) for weight, term in self.terms if term is not x)
        return (*others, (own, x)) if own else others
