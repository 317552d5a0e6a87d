"""Gradients of single samples by one parameter, measured and summed without being formed where they are large.

Each form answers two questions: how long is every sample's gradient, and what is their sum with given weights?

Letters: C clients, B samples, T positions, n samples of any client; I inputs and O outputs of a layer, V rows of a
table of width W.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

CHUNK = 1 << 22  # entries of Gram matrices or of samples' gradients alive at once: 16 MiB in float32


class Part(Protocol):
    """The gradients of every sample by one parameter, in a form smaller than themselves."""

    def square_norms(self) -> Tensor:
        """[C, B]."""
        ...

    def formed(self) -> Tensor:
        """[C, B, *], the gradients themselves."""
        ...

    def add_(self, view: Tensor, factors: Tensor) -> None:
        """view [C, *] += the sum over samples of factor [C, B] times gradient."""
        ...


class Each:
    """Gradients [C, B, *] of a small tensor, as they are."""

    def __init__(self, grads: Tensor) -> None:
        self.grads = grads

    def square_norms(self) -> Tensor:
        return self.grads.flatten(2).square().sum(-1)

    def formed(self) -> Tensor:
        return self.grads

    def add_(self, view: Tensor, factors: Tensor) -> None:
        view += torch.einsum("cb,cb...->c...", factors, self.grads)


class Outer:
    """A matrix [O, I] on inputs [C, B, T, I], with gradients [C, B, T, O] at its outputs."""

    def __init__(self, deltas: Tensor, inputs: Tensor) -> None:
        self.deltas, self.inputs = deltas, inputs

    def square_norms(self) -> Tensor:
        return outer_square_norms(self.deltas.flatten(0, 1), self.inputs.flatten(0, 1)).view(self.deltas.shape[:2])

    def formed(self) -> Tensor:
        return self.deltas.mT @ self.inputs

    def add_(self, view: Tensor, factors: Tensor) -> None:
        scaled = (self.deltas * factors[..., None, None]).flatten(1, 2)
        view.baddbmm_(scaled.mT, self.inputs.flatten(1, 2))


class Rows:
    """A table [V, W] read at places [C, B, T], with gradients [C, B, T, W] at what was read."""

    def __init__(self, deltas: Tensor, index: Tensor, size: int) -> None:
        self.deltas, self.index, self.size = deltas, index, size

    def square_norms(self) -> Tensor:
        """The sum over pairs of positions with one index of d . d', or that of the table where it is the shorter."""
        deltas, index = self.deltas.flatten(0, 1), self.index.flatten(0, 1)
        length, width = deltas.shape[1:]
        by_pairs = length <= self.size
        each = max(1, CHUNK // (2 * length * length if by_pairs else self.size * width))
        found = [
            ((d @ d.mT) * (i[:, :, None] == i[:, None])).sum((-2, -1))
            if by_pairs
            else self._tables(d, i).square().sum((-2, -1))
            for d, i in zip(deltas.split(each), index.split(each), strict=True)
        ]
        return torch.cat(found).clamp_(min=0).view(self.deltas.shape[:2])

    def formed(self) -> Tensor:
        return self._tables(self.deltas, self.index)

    def add_(self, view: Tensor, factors: Tensor) -> None:
        scaled = (self.deltas * factors[..., None, None]).flatten(1, 2)
        view.scatter_add_(1, self.index.flatten(1)[..., None].expand_as(scaled), scaled)

    def _tables(self, deltas: Tensor, index: Tensor) -> Tensor:
        table = deltas.new_zeros(*index.shape[:-1], self.size, deltas.shape[-1])
        return table.scatter_add_(-2, index[..., None].expand_as(deltas), deltas)


def outer_square_norms(deltas: Tensor, inputs: Tensor) -> Tensor:
    """[n] squared norms of sum_t d_t a_t^T for deltas [n, T, O] and inputs [n, T, I]."""
    length, outputs, width = *deltas.shape[1:], inputs.shape[2]
    if length == 1:
        return deltas.square().sum((-2, -1)) * inputs.square().sum((-2, -1))
    by_pairs = length * (outputs + width) < outputs * width  # whichever products cost less
    each = max(1, CHUNK // (2 * length * length if by_pairs else outputs * width))
    found = [
        ((d @ d.mT) * (a @ a.mT)).sum((-2, -1)) if by_pairs else (d.mT @ a).square().sum((-2, -1))
        for d, a in zip(deltas.split(each), inputs.split(each), strict=True)
    ]
    return torch.cat(found).clamp_(min=0)  # what cancels in a sum over pairs may end a rounding error below zero
