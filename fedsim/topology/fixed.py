"""Graphs that follow from the number of peers alone, or are given.

Letters: n peers, E pairs of one who hears and one who is heard.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from fedsim.graph import Graph, everybody
from fedsim.topology.base import Linked, both_ways


@dataclass(frozen=True)
class Complete:
    """Every peer hears every other, and all count alike."""

    def period(self, n: int) -> int:
        return 1

    def graph(self, n: int, seed: int, step: int) -> Graph:
        return everybody(n)


@dataclass(frozen=True, kw_only=True)
class Ring(Linked):
    """Every peer hears the one before and the one behind it."""

    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        i = torch.arange(n)
        return both_ways(torch.stack([i, (i + 1) % n]))


@dataclass(frozen=True, kw_only=True)
class Torus(Linked):
    """A grid whose borders meet: every peer hears the four others beside, above and below it.

    Args:
        rows: of the grid, a divisor of the number of peers; null takes the one that makes it most nearly square.
    """

    rows: int | None = None

    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        rows = max(k for k in range(1, isqrt(n) + 1) if n % k == 0) if self.rows is None else self.rows
        if not 1 < rows < n or n % rows:
            what = (
                f"{n} peers make no such grid" if self.rows is None else f"rows={rows} make no such grid of {n} peers"
            )
            raise ValueError(f"a torus has two rows or more of one length: {what}; change clients.count, or take ring")
        i = torch.arange(n).view(rows, -1)
        right, below = (torch.stack([i.flatten(), i.roll(-1, dim).flatten()]) for dim in (1, 0))
        return both_ways(torch.cat([right, below], dim=1))


@dataclass(frozen=True, kw_only=True)
class Hypercube(Linked):
    """Every peer hears those whose numbers differ from its own in one binary digit."""

    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        if n & (n - 1):
            raise ValueError(f"a hypercube has a power of two of peers, got {n}; change clients.count")
        i = torch.arange(n)
        return both_ways(_all([torch.stack([i, i ^ (1 << k)]) for k in range(n.bit_length() - 1)]))


@dataclass(frozen=True, kw_only=True)
class Exponential(Linked):
    """Every peer hears those 1, 2, 4, ... places on around a circle; links are one-way, weights doubly stochastic.

    Ying, Yuan, Chen, Hu, Pan, Yin. Exponential graph is provably efficient for decentralized deep training. NeurIPS
    2021, arXiv:2110.13363.

    Args:
        one_peer: hear one of them only in each step, in turn: a power of two of peers agree after log2 n steps.
    """

    one_peer: bool = False

    def period(self, n: int) -> int:
        return max(1, (n - 1).bit_length()) if self.one_peer else 1

    def turn(self, n: int, step: int) -> int:
        return step % self.period(n)

    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        i, powers = torch.arange(n), range((n - 1).bit_length())
        return _all([torch.stack([i, (i + (1 << k)) % n]) for k in powers if not self.one_peer or k == turn])


@dataclass(frozen=True, kw_only=True)
class Edges(Linked):
    """Links as they are given, each between two peers that then hear each other.

    Args:
        edges: pairs of peers' numbers from 0, [[0, 1], [1, 2]]; with weights, [[0, 1, 0.5], [1, 2, 0.25]], `mixing`
            does not count.
        file: a text file with one such pair a line, in place of `edges`.
    """

    edges: tuple[tuple[float, ...], ...] | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.edges is None) == (self.file is None):
            raise ValueError("give either edges, [[0, 1], [1, 2]], or a file with a pair a line")
        if self.edges is not None:  # lists from Python: what is frozen can be looked up by
            object.__setattr__(self, "edges", tuple(tuple(link) for link in self.edges))

    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        return both_ways(self._given(n)[:, :2].long().T)

    def weights(self, n: int, pairs: Tensor) -> Tensor | None:
        given = self._given(n)
        if given.shape[1] == 2:
            return None
        i, j = given[:, :2].long().T
        order = torch.cat([i * n + j, j * n + i]).argsort()  # that of the pairs
        weights = given[:, 2].repeat(2)[order]
        total = torch.zeros(n, dtype=torch.float64).index_add_(0, pairs[0], weights)
        if not bool((weights > 0).all()) or float(total.max()) > 1:
            raise ValueError(
                f"weights must be positive, and those of a peer's links add up to 1 at most: the least is "
                f"{float(weights.min()):g}, and those of peer {int(total.argmax())} add up to {float(total.max()):g}"
            )
        return weights

    def _given(self, n: int) -> Tensor:
        """[links, 2 or 3] float64."""
        rows = self.edges if self.edges is not None else _read(str(self.file))
        widths = {len(row) for row in rows}
        if len(widths) != 1 or not widths <= {2, 3}:
            raise ValueError("a link is two peers' numbers, [0, 1], or all links bring a weight too, [0, 1, 0.5]")
        given = torch.tensor(rows, dtype=torch.float64)
        ids = given[:, :2]
        for i, j in ids[(ids != ids.floor()).any(1) | (ids < 0).any(1) | (ids >= n).any(1) | (ids[:, 0] == ids[:, 1])]:
            raise ValueError(f"[{i:g}, {j:g}] is no link between two of the {n} peers 0..{n - 1}")
        if len(torch.unique(ids.sort(1).values, dim=0)) < len(ids):
            raise ValueError("a link stands there twice; each links two peers both ways")
        return given


def _all(parts: list[Tensor]) -> Tensor:
    """[2, E]: all these pairs; a single peer has none."""
    return torch.cat(parts, dim=1) if parts else torch.zeros(2, 0, dtype=torch.int64)


def _read(path: str) -> tuple[tuple[float, ...], ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return tuple(tuple(map(float, line.split())) for line in lines if line.strip())
    except (OSError, ValueError) as e:
        raise ValueError(f"can't read {path}: {e}; it holds a pair of peers' numbers a line, such as `0 1`") from e
