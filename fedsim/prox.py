"""What a problem adds to its operator: h of <F(z*), z - z*> + h(z) - h(z*) >= 0 for all z, by its prox.

    prox(z, gamma) = argmin over u of h(u) + |u - z|^2 / (2 gamma)

For a set, h is zero in it and infinite outside: the prox is the projection, whatever gamma. To add one: a frozen
dataclass, and a row of the table below.

Letters: P entries of z, n of one of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from fedsim.params import Layout


class Prox(Protocol):
    """The prox of h, of every row."""

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        """[..., n] -> [..., n]; gamma is the step."""
        ...


@dataclass(frozen=True)
class Free:
    """h = 0: every point is allowed and none is better."""

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        return z


FREE = Free()


@dataclass(frozen=True, kw_only=True)
class Ball:
    """Points no farther than `radius` from zero.

    Args:
        radius: of the Euclidean ball.
    """

    radius: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.radius < inf:
            raise ValueError(f"radius must be positive, got {self.radius}")

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        return z * (self.radius / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=self.radius))


@dataclass(frozen=True, kw_only=True)
class Box:
    """Points whose every entry lies between `low` and `high`.

    Args:
        low, high: the bounds of an entry.
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        return z.clamp(self.low, self.high)


@dataclass(frozen=True)
class Simplex:
    """Points whose entries are at least zero and sum to one: mixed strategies of a game.

    The projection takes the same number from every entry and cuts at zero (Held, Wolfe, Crowder. 1974).
    """

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        ordered = z.sort(dim=-1, descending=True).values
        counts = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
        taken = (ordered.cumsum(-1) - 1) / counts  # by the first entries alone, from each of them
        positive = (ordered > taken).sum(-1, keepdim=True)
        return (z - taken.gather(-1, positive - 1)).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class L1:
    """weight * |z|_1, a penalty that makes entries zero.

    Args:
        weight: of the penalty.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.weight < inf:
            raise ValueError(f"weight must be positive, got {self.weight}")

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        return z.sign() * (z.abs() - gamma * self.weight).clamp(min=0)


PROXES: dict[str, type] = {"ball": Ball, "box": Box, "simplex": Simplex, "l1": L1}


@dataclass(frozen=True)
class Each:
    """A prox of single tensors of z, as a sum of functions of these has it.

    Args:
        layout: of z.
        of: {tensor: its prox}; the others are free.
    """

    layout: Layout
    of: Mapping[str, Prox]

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        out = z.clone()
        for name, offset, size in zip(self.layout.names, self.layout.offsets, self.layout.sizes, strict=True):
            if name in self.of:
                out[..., offset : offset + size] = self.of[name](z[..., offset : offset + size], gamma)
        return out


@dataclass(frozen=True)
class Rows:
    """The same prox of each of `count` equal parts of z, one after the other in it.

    Args:
        of: each part.
        count: of parts.
    """

    of: Prox
    count: int

    def __call__(self, z: Tensor, gamma: float) -> Tensor:
        return self.of(z.unflatten(-1, (self.count, -1)), gamma).flatten(-2)


def solve(
    field: Callable[[Tensor], Tensor],
    z: Tensor,
    prox: Prox,
    step: float,
    tolerance: float = 1e-12,
    limit: int = 100_000,
) -> Tensor:
    """z* [P] of a variational inequality, by extragradient.

    Args:
        field: F, [P] -> [P].
        z: [P], where to start.
        prox: of h.
        step: below one over F's Lipschitz constant.
        tolerance: how far the last step may go, beside 1 + |z*|.
        limit: steps at most.

    Raises:
        ValueError: if it has not come to rest by then.
    """
    for _ in range(limit):
        half = prox(z - step * field(z), step)
        before, z = z, prox(z - step * field(half), step)
        if float((z - before).norm()) <= tolerance * (1 + float(z.norm())):
            return z
    raise ValueError(f"no solution found in {limit} steps; is the problem monotone? A larger lam makes it so")
