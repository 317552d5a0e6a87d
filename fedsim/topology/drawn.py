"""Random graphs, drawn by networkx: once for a run, keyed by its seed, or anew every so many steps.

Letters: n peers, E pairs of one who hears and one who is heard.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsim.streams import server_rng
from fedsim.topology.base import Linked, both_ways

if TYPE_CHECKING:
    from networkx import Graph as Drawing

LOOKED_AT = 10  # graphs that stand for all that will be drawn


@dataclass(frozen=True, kw_only=True)
class Drawn(Linked):
    """A random graph.

    Args:
        redraw: steps after which another one is drawn, which may fall apart for a while; null keeps the first.
    """

    redraw: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.redraw is not None and self.redraw < 1:
            raise ValueError(f"redraw must be a number of steps, at least 1, or null, got {self.redraw}")

    def period(self, n: int) -> int:
        return 1 if self.redraw is None else LOOKED_AT * self.redraw

    def turn(self, n: int, step: int) -> int:
        return 0 if self.redraw is None else step // self.redraw

    @abstractmethod
    def draw(self, n: int, key: int) -> Drawing:
        """A graph of the peers 0..n-1; `key` is the seed of all that is random about it."""

    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        key = int(server_rng(seed, "topology", turn).integers(2**32))
        edges = torch.tensor(list(self.draw(n, key).edges), dtype=torch.int64).view(-1, 2)
        return both_ways(edges.T)


@dataclass(frozen=True, kw_only=True)
class RandomRegular(Drawn):
    """Every peer has as many neighbours, who are drawn evenly.

    Args:
        degree: neighbours of each, fewer than there are peers; degree times peers is even.
    """

    degree: int = 3

    def draw(self, n: int, key: int) -> Drawing:
        from networkx import random_regular_graph

        if not 1 <= self.degree < n or self.degree * n % 2:
            raise ValueError(
                f"degree={self.degree} of {n} peers can't be: it is from 1 to {n - 1}, and one of the two numbers is "
                "even; change it or clients.count"
            )
        return random_regular_graph(self.degree, n, seed=key)


@dataclass(frozen=True, kw_only=True)
class ErdosRenyi(Drawn):
    """Every two peers are linked with one probability, independently.

    Args:
        p: the probability; a graph of n peers is hardly ever connected where it is below log(n) / n.
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be a probability in (0, 1], got {self.p}")

    def draw(self, n: int, key: int) -> Drawing:
        from networkx import fast_gnp_random_graph

        return fast_gnp_random_graph(n, self.p, seed=key)
