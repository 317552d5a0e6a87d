"""Numbers per tensor of a flat stack: sums, maxima and norms, and their way back to coordinates.

On a CPU a loop over tensors is cheapest. On a GPU the number of launches must not grow with clients or tensors, so the
stack is gathered into blocks of 64 that never straddle a tensor, each block is reduced, and the block results are
reduced in the same way until one number per tensor is left (four rounds for a million entries). Both forms have a
fixed order, so a client's number does not depend on the rows beside it.

Letters: k clients, P coordinates, L tensors, R rows of all matrices together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from math import prod

import torch
from torch import Tensor

from fedsim.params import Layout

_BLOCK = 64


@dataclass(frozen=True)
class Segments:
    """Consecutive runs of coordinates: the tensors of a layout, or the rows of its tensors.

    >>> seg = Segments((2, 1))
    >>> seg.sums(torch.tensor([[1., 2., 5.]]))
    tensor([[3., 5.]])
    >>> seg.expand(torch.tensor([[3., 5.]]))
    tensor([[3., 3., 5.]])

    Args:
        sizes: entries of each run, in order, covering the vector.
        shapes: shape of each run as [rows, columns]; empty when the runs are rows themselves.
        matrices: whether each run is a tensor of two dimensions or more.
    """

    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...] = ()
    matrices: tuple[bool, ...] = ()

    @classmethod
    def of(cls, layout: Layout) -> Segments:
        """One run per tensor; a kernel [out, in, kh, kw] counts as [out, in * kh * kw], a vector as [1, n]."""
        shapes = tuple((s[0], prod(s[1:])) if len(s) >= 2 else (1, prod(s)) for s in layout.shapes)
        return cls(layout.sizes, shapes, tuple(len(s) >= 2 for s in layout.shapes))

    @cached_property
    def rows(self) -> Segments:
        """The rows of all tensors as runs of their own: R of them."""
        return Segments(tuple(columns for rows, columns in self.shapes for _ in range(rows)))

    @cached_property
    def rows_of(self) -> Segments:
        """How the R rows are grouped into tensors: runs over [k, R]."""
        return Segments(tuple(rows for rows, _ in self.shapes))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each run starts."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    def width(self, per: str) -> int:
        """How many numbers one per coordinate, tensor, row, column or client are."""
        return {
            "coordinate": sum(self.sizes),
            "tensor": len(self.sizes),
            "row": sum(rows for rows, _ in self.shapes),
            "column": sum(columns for _, columns in self.shapes),
            "client": 1,
        }[per]

    def shape_factors(self, like: Tensor) -> Tensor:
        """[1, L] sqrt(max(1, rows / columns)) of each tensor."""

        def factors() -> Tensor:
            return torch.tensor([[max(1.0, rows / columns) ** 0.5 for rows, columns in self.shapes]], dtype=like.dtype)

        return self._constant("shape_factors", like, factors)

    def counts(self, like: Tensor) -> Tensor:
        """[1, L] entries of each run, in the dtype and on the device of `like`."""
        return self._constant("counts", like, lambda: torch.tensor([self.sizes], dtype=like.dtype))

    def is_matrix(self, like: Tensor) -> Tensor:
        """[1, L] bool, which runs are tensors of two dimensions or more."""
        return self._constant("is_matrix", like, lambda: torch.tensor([self.matrices]))

    def column_sums(self, p: Tensor) -> Tensor:
        """Sum over the rows of each tensor viewed as [rows, columns]: [k, P] -> [k, all columns]."""
        if not _many_launches_hurt(p):
            return torch.cat([view.sum(1) for view in self.views(p)], 1)

        def by_column() -> Tensor:
            return torch.cat([view.T.reshape(-1) for view in self.views(torch.arange(sum(self.sizes)))])

        return self._tall.sums(p.index_select(1, self._constant("by_column", p, by_column)))

    @cached_property
    def _tall(self) -> Segments:
        """Each column a run of its own, one behind the other."""
        return Segments(tuple(rows for rows, columns in self.shapes for _ in range(columns)))

    def column_heights(self, like: Tensor) -> Tensor:
        """[1, all columns], over how many rows each column runs."""
        return self._constant("column_heights", like, lambda: torch.tensor([self._tall.sizes], dtype=like.dtype))

    def expand_columns(self, per_column: Tensor) -> Tensor:
        """Each column's number at each of its coordinates: [k, all columns] -> [k, P]."""

        def column() -> Tensor:
            numbers = torch.arange(per_column.shape[1]).split([columns for _, columns in self.shapes])
            return torch.cat([own.repeat(rows) for own, (rows, _) in zip(numbers, self.shapes, strict=True)])

        return per_column.index_select(1, self._constant("column", per_column, column))

    def sums(self, p: Tensor) -> Tensor:
        """Sum of each run: [k, P] -> [k, L]."""
        return self._blocked(p, "sum") if _many_launches_hurt(p) else self._loop(p, "sum")

    def maxima(self, p: Tensor) -> Tensor:
        """Largest entry of each run: [k, P] -> [k, L]."""
        return self._blocked(p, "max") if _many_launches_hurt(p) else self._loop(p, "max")

    def norms(self, p: Tensor) -> Tensor:
        """Euclidean norm of each run: [k, P] -> [k, L]."""
        return self.sums(p * p).sqrt_()

    def expand(self, per_run: Tensor) -> Tensor:
        """Each run's number at each of its coordinates: [k, L] -> [k, P]."""
        if len(self.sizes) == 1:
            return per_run.expand(-1, self.sizes[0])
        return per_run.index_select(1, self._constant("owner", per_run, self._owner))

    def _owner(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))

    def views(self, flat: Tensor) -> Iterator[Tensor]:
        """[..., rows, columns] of each tensor, from [..., P]."""
        for start, size, shape in zip(self.offsets, self.sizes, self.shapes, strict=True):
            yield flat.narrow(-1, start, size).unflatten(-1, shape)

    def _loop(self, p: Tensor, how: str) -> Tensor:
        parts, at = [], 0
        for size, neighbours in groupby(self.sizes):  # equal runs side by side, such as a matrix's rows: one call
            num = len(list(neighbours))
            block = p.narrow(1, at, num * size).unflatten(1, (num, size))
            parts.append(block.sum(-1) if how == "sum" else block.amax(-1))
            at += num * size
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _blocked(self, p: Tensor, how: str) -> Tensor:
        sizes = self.sizes
        while True:
            index, valid, blocks = self._plan(sizes, p.device)
            fill = 0.0 if how == "sum" else float("-inf")
            gathered = torch.where(valid, p.index_select(1, index), fill).unflatten(1, (-1, _BLOCK))
            p = gathered.sum(-1) if how == "sum" else gathered.amax(-1)
            if max(blocks) == 1:
                return p
            sizes = blocks

    @cached_property
    def _cache(self) -> dict[object, tuple[Tensor, Tensor, tuple[int, ...]]]:
        return {}

    @cached_property
    def _constants(self) -> dict[object, Tensor]:
        return {}

    def _constant(self, name: str, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        key = (name, like.dtype, like.device)
        if key not in self._constants:
            self._constants[key] = make().to(like.device)
        return self._constants[key]

    def _plan(self, sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Where each entry of each block comes from, which entries are real, and blocks per run."""
        key = (sizes, device)
        if key not in self._cache:
            n = torch.tensor(sizes)
            blocks = (n + _BLOCK - 1) // _BLOCK
            owner = torch.repeat_interleave(torch.arange(len(n)), blocks)
            nth = torch.arange(len(owner)) - (blocks.cumsum(0) - blocks)[owner]
            within = nth[:, None] * _BLOCK + torch.arange(_BLOCK)
            valid = within < n[owner, None]
            start = (n.cumsum(0) - n)[owner, None]
            index = torch.where(valid, start + within, 0).reshape(-1)
            self._cache[key] = (index.to(device), valid.reshape(-1).to(device), tuple(blocks.tolist()))
        return self._cache[key]


def _many_launches_hurt(p: Tensor) -> bool:
    """Whether to spend more memory traffic on fewer operations: on a GPU, yes."""
    return p.is_cuda
