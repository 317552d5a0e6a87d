"""Who hears whom among peers in one step, and how much what is heard counts: a sparse matrix, row by row.

Time and memory of what is done with it are those of its pairs, not of all pairs there could be.

Letters: n peers, E pairs of one who hears and one who is heard, C peers of a stack, M vectors sent, P entries of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Mixing = Literal["metropolis", "uniform"]
DENSE = 0.25  # of all pairs: from here on one product of matrices costs less than a sum for each who hears


@dataclass(frozen=True, eq=False)
class Graph:
    """Each peer hears itself and its neighbours.

    Args:
        start: [n + 1], peer i hears `peers[start[i] : start[i + 1]]`.
        peers: [E], ascending for each who hears.
        weights: [E] float64, W_ij; what one peer hears adds up to one.
        own: [n], which of the numbers in `peers` is each itself.
        lost: [n], how many vectors more were on their way to each and never reach it.

    >>> ring = Graph.of(4, torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0], [1, 0, 2, 1, 3, 2, 0, 3]]))
    >>> ring.peers.tolist(), ring.weights[:3]
    ([0, 1, 3, 0, 1, 2, 1, 2, 3, 0, 2, 3], tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64))
    """

    start: Tensor
    peers: Tensor
    weights: Tensor
    own: Tensor
    lost: Tensor

    @classmethod
    def of(cls, n: int, pairs: Tensor, mixing: Mixing = "metropolis", weights: Tensor | None = None) -> Graph:
        """The graph of some pairs.

        Args:
            n: how many peers there are.
            pairs: [2, E'], who hears and whom; each once, and nobody itself.
            mixing: `metropolis`, W_ij = 1 / (1 + the larger of the two degrees), which is doubly stochastic wherever
                all pairs hear each other (Xiao, Boyd. Fast linear iterations for distributed averaging. 2004);
                `uniform`, all that a peer hears counts alike. A peer's own vector has the rest.
            weights: [E'] float64 that are given instead.
        """
        degrees = torch.bincount(pairs[0], minlength=n)
        if weights is None:
            most = degrees[pairs[0]] if mixing == "uniform" else degrees[pairs].amax(0)
            weights = 1.0 / (1.0 + most.double())
        own = torch.arange(n)
        rest = 1.0 - torch.zeros(n, dtype=torch.float64).index_add_(0, pairs[0], weights)
        order = torch.argsort(torch.cat([pairs[0], own]) * n + torch.cat([pairs[1], own]))
        peers, weights = torch.cat([pairs[1], own])[order], torch.cat([weights, rest])[order]
        return cls(_starts(degrees + 1), peers, weights, own, torch.zeros_like(own))

    def __len__(self) -> int:
        return len(self.start) - 1

    @cached_property
    def counts(self) -> Tensor:
        """[n] how many vectors each hears, its own among them."""
        return self.start.diff()

    @cached_property
    def hearers(self) -> Tensor:
        """[E] who hears."""
        return torch.repeat_interleave(self.counts, output_size=len(self.peers))

    @cached_property
    def is_own(self) -> Tensor:
        """[E] bool: the pairs of a peer with itself."""
        return self.peers == self.own[self.hearers]

    def rows(self, index: Tensor) -> Graph:
        """What some of the peers hear, in their order; whom they hear keeps its number."""
        counts = self.counts[index]
        start = _starts(counts)
        shift = torch.repeat_interleave(self.start[index] - start[:-1], counts)
        at = shift + torch.arange(len(shift))
        return Graph(start, self.peers[at], self.weights[at], self.own[index], self.lost[index])

    def sums(self, values: Tensor) -> Tensor:
        """[n]: for each who hears the sum of its pairs' values [E]."""
        return values.new_zeros(len(self)).index_add_(0, self.hearers, values)

    def ranks(self, values: Tensor) -> Tensor:
        """[E]: the place of each pair's value [E] among those of who hears, from 0; ties go to the lower peer."""
        order = torch.argsort(values, stable=True)
        order = order[torch.argsort(self.hearers[order], stable=True)]
        place = torch.arange(len(order), device=order.device) - self.start[self.hearers]
        return torch.empty_like(order).scatter_(0, order, place)

    def chosen(self, which: Tensor, weights: Tensor | None = None) -> Graph:
        """Some of the pairs [E] bool, with their weights or with others [E]."""
        weights = self.weights if weights is None else weights
        return Graph(_starts(self.sums(which.long())), self.peers[which], weights[which], self.own, self.lost)

    def without(self, lost: Tensor) -> Graph:
        """The graph without some pairs [E] bool of two peers; their weights go to the vector of who would have heard.

        So a sum of all peers' vectors stays what it was where both of two do not hear each other.
        """
        if not bool(lost.any()):
            return self
        rest = self.sums(self.weights.where(lost, 0.0))
        left = self.chosen(~lost, torch.where(self.is_own, self.weights + rest[self.hearers], self.weights))
        return replace(left, lost=self.lost + self.sums(lost.long()))

    def among(self, ids: Tensor) -> Graph:
        """The graph of those peers [R] who are there, numbered as they stand; see `without`."""
        place = torch.full((len(self),), -1).scatter_(0, ids, torch.arange(len(ids)))
        here = self.without((place[self.peers] < 0) & ~self.is_own).rows(ids)
        return replace(here, peers=place[here.peers], own=place[here.own])

    def to(self, device: torch.device) -> Graph:
        parts = (self.start, self.peers, self.weights, self.own, self.lost)
        return Graph(*(tensor.to(device) for tensor in parts))

    def dense(self, width: int) -> Tensor:
        """[n, width] float64: the matrix W."""
        out = self.weights.new_zeros(len(self), width)
        return out.index_put_((self.hearers, self.peers), self.weights, accumulate=True)

    def is_dense(self, width: int) -> bool:
        """Whether so many of the pairs with `width` others are there that products of matrices cost less."""
        return len(self.peers) >= DENSE * len(self) * width

    def mix(self, v: Tensor) -> Tensor:
        """[n, P]: the weighted sum of what each peer hears of the rows of v [M, P].

        A row that is not finite makes those that hear it so, and nobody else.
        """
        whole = len(self.peers) == len(self) * len(v)
        if whole or (self.is_dense(len(v)) and bool(v.sum().isfinite())):
            return self.dense(len(v)).to(v) @ v
        weights = self.weights.to(v.dtype)
        return F.embedding_bag(self.peers, v, self.start[:-1], mode="sum", per_sample_weights=weights)


def _starts(counts: Tensor) -> Tensor:
    """[n + 1]: where the pairs of each peer begin, and where the last one's end, from how many each has [n]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass
class Inbox:
    """What peers sent to the clients of one stack.

    Args:
        fields: {name: [M, P]}, every vector sent, one stack for all receivers.
        heard: of the C clients, which of these rows reached each, its own among them, and how much each counts.
    """

    fields: dict[str, Tensor]
    heard: Graph

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def own(self, name: str) -> Tensor:
        """[C, P]: the clients' own vectors."""
        return self.fields[name][self.heard.own]

    def mix(self, name: str) -> Tensor:
        """[C, P]: the weighted mean of what each client heard, sum_j W_ij v_j."""
        return self.heard.mix(self.fields[name])

    def rows(self, index: Tensor) -> Inbox:
        """That of some of these clients."""
        return Inbox(self.fields, self.heard.rows(index))

    def to(self, device: torch.device) -> Inbox:
        """The vectors themselves, which may take much room, but so that writing to them is noticed."""
        return Inbox({name: v.to(device).data for name, v in self.fields.items()}, self.heard.to(device))


class Topology(Protocol):
    """Which graph peers have in each step: a frozen dataclass, since what is known of it is looked up by it."""

    def __hash__(self) -> int: ...

    def graph(self, n: int, seed: int, step: int) -> Graph:
        """The graph of n peers in a step; where it is drawn, keyed by the run's seed and the step.

        Raises:
            ValueError: if there is none of so many peers, or it falls apart for good.
        """
        ...

    def period(self, n: int) -> int:
        """Steps whose graphs tell of all: after them they come again, or others are drawn alike."""
        ...


@lru_cache(maxsize=2)
def everybody(n: int) -> Graph:
    """The graph in which each of n peers hears every other, all alike."""
    peers, own = torch.arange(n).repeat(n), torch.arange(n)
    weights = torch.full((n * n,), 1.0 / max(n, 1), dtype=torch.float64)
    return Graph(torch.arange(n + 1) * n, peers, weights, own, torch.zeros_like(own))
