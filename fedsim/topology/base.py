"""What topologies share: graphs of their pairs, refusal of those that fall apart, and the spectral gap.

Letters: n peers, E pairs of one who hears and one who is heard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from fedsim.graph import Graph, Mixing, Topology

MOST_FOR_GAP = 1000  # peers up to which a spectral gap is computed, which takes time of the third power
SHOWN = 5  # components, and peers of each, that a message names


@dataclass(frozen=True, kw_only=True)
class Linked(ABC):
    """A topology.

    Args:
        mixing: weights of what is heard. metropolis, W_ij = 1 / (1 + the larger of the two degrees), keeps the mean of
            all peers; uniform, each counts all that it hears alike.
    """

    mixing: Mixing = "metropolis"

    def __post_init__(self) -> None:
        if self.mixing not in get_args(Mixing):
            raise ValueError(f"mixing must be metropolis or uniform, got {self.mixing!r}")

    def period(self, n: int) -> int:
        """See `fedsim.graph.Topology`; 1 if there is one graph only."""
        return 1

    def turn(self, n: int, step: int) -> int:
        """Which of its graphs n peers have in a step."""
        return 0

    @abstractmethod
    def pairs(self, n: int, seed: int, turn: int) -> Tensor:
        """[2, E] who hears and whom, each pair once and nobody itself.

        Raises:
            ValueError: if there is no such graph of n peers.
        """

    def graph(self, n: int, seed: int, step: int) -> Graph:
        """See `fedsim.graph.Topology`."""
        return _graph(self, n, seed, self.turn(n, step))

    def weights(self, n: int, pairs: Tensor) -> Tensor | None:
        """[E] float64 that are given for the pairs [2, E]; None where `mixing` says them."""
        return None


@lru_cache(maxsize=4)
def _graph(topology: Linked, n: int, seed: int, turn: int) -> Graph:
    pairs = topology.pairs(n, seed, turn)
    if topology.period(n) == 1:
        check_connected(n, pairs)
    return Graph.of(n, pairs, topology.mixing, topology.weights(n, pairs))


def both_ways(pairs: Tensor) -> Tensor:
    """[2, E]: pairs [2, E'] and their opposites, each once, without those of a peer with itself."""
    i, j = pairs[:, pairs[0] != pairs[1]]
    n = int(pairs.max()) + 1 if pairs.numel() else 1
    found = torch.unique(torch.cat([i * n + j, j * n + i]))  # one number a pair, which sorts much faster than two
    return torch.stack([found // n, found % n])


def check_connected(n: int, pairs: Tensor) -> None:
    """Refuse a graph of n peers in which some can never hear of others.

    Raises:
        ValueError: naming its parts.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    matrix = coo_array((np.ones(pairs.shape[1], dtype=np.int8), tuple(pairs.numpy())), shape=(n, n))
    num_parts, labels = connected_components(matrix, directed=True, connection="strong")
    if num_parts > 1:
        parts = sorted((np.flatnonzero(labels == k).tolist() for k in range(min(num_parts, n))), key=len, reverse=True)
        raise ValueError(
            f"the graph of {n} peers is not connected, it falls into {num_parts} parts: {_named(parts)}; give it "
            "more links, or another seed where it is drawn"
        )


def _named(parts: Sequence[Sequence[int]]) -> str:
    shown = ["{" + ", ".join(map(str, part[:SHOWN])) + (", ..." if len(part) > SHOWN else "") + "}" for part in parts]
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")


def spectral_gap(graphs: Sequence[Graph]) -> float | None:
    """One minus the share of peers' disagreement that mixing by these graphs in turn leaves at most, per step.

    That is 1 - sigma^(1 / steps), sigma the largest singular value of the product of their matrices beside that of the
    vector of ones: for one symmetric matrix one minus the second largest modulus of its eigenvalues. None for too many
    peers to compute it.

    >>> triangle = Graph.of(3, torch.tensor([[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]]))
    >>> round(spectral_gap([triangle]), 12)
    1.0
    """
    n = len(graphs[0])
    if n > MOST_FOR_GAP:
        return None
    product = torch.eye(n, dtype=torch.float64) - 1.0 / n
    for graph in graphs:
        product = graph.mix(product)
    product -= product.mean(0)
    sigma = float(torch.linalg.eigvalsh(product.T @ product)[-1].clamp(min=0).sqrt())
    return 1.0 - sigma ** (1 / len(graphs))


@lru_cache(maxsize=2)
def overview(topology: Topology, n: int, seed: int) -> tuple[Sequence[Graph], float | None]:
    """(the graphs of n peers in the first steps, as many as tell of all; their spectral gap)."""
    graphs = [topology.graph(n, seed, step) for step in range(topology.period(n))]
    return graphs, spectral_gap(graphs)
