"""What a layer leaves of its parameters' gradients: factors, from which a sink takes what it wants.

After a backward pass a layer has its inputs a and the gradients d at its outputs, sample by sample. That is enough for
the sum of the samples' gradients, for any weighted sum of them, and for the norm of each one: norm(a)^2 norm(d)^2 for a
linear layer, over a sequence the sum over pairs of positions of (a . a')(d . d'). Where the gradient of one sample is
smaller than its Gram matrices, it is formed, measured and forgotten.

Goodfellow. Efficient per-example gradient computations. arXiv:1510.01799.
Li, Tramer, Liang, Hashimoto. arXiv:2110.05679 (sequences, embeddings).

Letters: C clients, B samples, T positions, n samples of any client; I inputs and O outputs of a layer, V rows of a
table of width W. What layers leave, and the views of parameters, have no client axis where C = 1; what is asked of
single samples always has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Number = float | Tensor
"""A number, or a tensor [] on the device that holds it, as a step has it that is to hold for any learning rate."""

CHUNK = 1 << 22  # entries of Gram matrices or of samples' gradients alive at once: 16 MiB in float32


class Factors(Protocol):
    """The gradients of every sample by one parameter, in a form smaller than themselves."""

    def write_(self, view: Tensor) -> None:
        """view becomes their sum over the samples."""
        ...

    def add_(self, view: Tensor, factor: Number) -> None:
        """view += factor times their sum over the samples."""
        ...

    def square_norms(self) -> Tensor:
        """[C, B]."""
        ...

    def formed(self) -> Tensor:
        """[C, B, *], the gradients themselves."""
        ...

    def add_weighted_(self, view: Tensor, weights: Tensor) -> None:
        """view [C, *] += the sum over samples of weight [C, B] times gradient."""
        ...


class Small:
    """Gradients of a small tensor.

    Args:
        total: gives their sum.
        each: gives [C, B, *], those of the samples; None where the layer cannot tell samples apart.
    """

    def __init__(self, total: Callable[[], Tensor], each: Callable[[], Tensor] | None = None) -> None:
        self.total, self.each = total, each

    def write_(self, view: Tensor) -> None:
        view.copy_(self.total())

    def add_(self, view: Tensor, factor: Number) -> None:
        add_(view, self.total(), factor)

    def square_norms(self) -> Tensor:
        return self.formed().flatten(2).square().sum(-1)

    def formed(self) -> Tensor:
        assert self.each is not None, "the session refuses tapes with such layers"
        return self.each()

    def add_weighted_(self, view: Tensor, weights: Tensor) -> None:
        view += torch.einsum("cb,cb...->c...", weights, self.formed())


class Outer:
    """A matrix [O, I] on inputs [.., B T, I], with gradients [.., B T, O] at its outputs.

    Args:
        deltas, inputs: in float32, or both in bfloat16.
        samples: B.
        positions_first: rows are [T B] and not [B T].
    """

    def __init__(self, deltas: Tensor, inputs: Tensor, samples: int, *, positions_first: bool = False) -> None:
        self.deltas, self.inputs, self.samples, self.positions_first = deltas, inputs, samples, positions_first

    def write_(self, view: Tensor) -> None:
        if self.deltas.dtype != view.dtype:
            view.copy_(self.deltas.mT @ self.inputs)
        elif view.ndim == 3:
            torch.bmm(self.deltas.mT, self.inputs, out=view)
        else:
            torch.mm(self.deltas.mT, self.inputs, out=view)

    def add_(self, view: Tensor, factor: Number) -> None:
        if self.deltas.dtype != view.dtype:
            return add_(view, self.deltas.mT @ self.inputs, factor)
        deltas, alpha = (self.deltas * factor, 1.0) if isinstance(factor, Tensor) else (self.deltas, factor)
        (view.baddbmm_ if view.ndim == 3 else view.addmm_)(deltas.mT, self.inputs, alpha=alpha)

    def square_norms(self) -> Tensor:
        deltas, inputs = self._by_sample(self.deltas), self._by_sample(self.inputs)
        return outer_square_norms(deltas.flatten(0, 1), inputs.flatten(0, 1)).view(deltas.shape[:2])

    def formed(self) -> Tensor:
        return self._by_sample(self.deltas).mT @ self._by_sample(self.inputs)

    def add_weighted_(self, view: Tensor, weights: Tensor) -> None:
        scaled = (self._by_sample(self.deltas) * weights[..., None, None]).flatten(1, 2)
        view.baddbmm_(scaled.mT, self._by_sample(self.inputs).flatten(1, 2))

    def _by_sample(self, rows: Tensor) -> Tensor:
        """[C, B, T, .]."""
        rows = rows if rows.ndim == 3 else rows[None]
        if self.positions_first:
            return rows.unflatten(1, (-1, self.samples)).transpose(1, 2)
        return rows.unflatten(1, (self.samples, -1))


class Rows:
    """A table [V, W] read at places [.., B, *], with gradients [.., B, *, W] at what was read.

    Args:
        deltas, index: of the layer.
        size: V.
        lead: 1 with a client axis in front, 0 without.
    """

    def __init__(self, deltas: Tensor, index: Tensor, size: int, lead: int) -> None:
        self.deltas, self.index, self.size, self.lead = deltas, index, size, lead

    def write_(self, view: Tensor) -> None:
        view.copy_(self._total())

    def add_(self, view: Tensor, factor: Number) -> None:
        add_(view, self._total(), factor)

    def square_norms(self) -> Tensor:
        """The sum over pairs of positions with one index of d . d', or that of the table where it is the shorter."""
        by_sample, places = self._by_sample()
        deltas, index = by_sample.flatten(0, 1), places.flatten(0, 1)
        length, width = deltas.shape[1:]
        by_pairs = length <= self.size
        each = max(1, CHUNK // (2 * length * length if by_pairs else self.size * width))
        found = [
            ((d @ d.mT) * (i[:, :, None] == i[:, None])).sum((-2, -1))
            if by_pairs
            else self._tables(d, i).square().sum((-2, -1))
            for d, i in zip(deltas.split(each), index.split(each), strict=True)
        ]
        return torch.cat(found).clamp_(min=0).view(by_sample.shape[:2])

    def formed(self) -> Tensor:
        return self._tables(*self._by_sample())

    def add_weighted_(self, view: Tensor, weights: Tensor) -> None:
        deltas, index = self._by_sample()
        scaled = (deltas * weights[..., None, None]).flatten(1, 2)
        view.scatter_add_(1, index.flatten(1)[..., None].expand_as(scaled), scaled)

    def _by_sample(self) -> tuple[Tensor, Tensor]:
        """(deltas [C, B, T, W], index [C, B, T])."""
        deltas, index = (self.deltas, self.index) if self.lead else (self.deltas[None], self.index[None])
        return deltas.reshape(*deltas.shape[:2], -1, deltas.shape[-1]), index.reshape(*index.shape[:2], -1)

    def _total(self) -> Tensor:
        return self._tables(self.deltas.flatten(self.lead, -2), self.index.flatten(self.lead))

    def _tables(self, deltas: Tensor, index: Tensor) -> Tensor:
        table = deltas.new_zeros(*index.shape[:-1], self.size, deltas.shape[-1])
        return table.scatter_add_(-2, index[..., None].expand_as(deltas), deltas)


def add_(view: Tensor, change: Tensor, factor: Number) -> None:
    """view += factor * change."""
    if isinstance(factor, Tensor):
        view.addcmul_(change, factor)
    else:
        view.add_(change, alpha=factor)


def given(tensor: Tensor) -> Callable[[], Tensor]:
    """What is known already, for `Small`."""
    return lambda: tensor


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
