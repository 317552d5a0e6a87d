"""Selections by chance: uniform, or with chances that differ and weights that make up for it.

With chances pi_i the sum of (p_i / pi_i) v_i over those drawn has the mean over all clients as its expectation, p_i
being the weight of a client in that mean (Horvitz, Thompson. A generalization of sampling without replacement from a
finite universe. JASA 47, 1952). Its weights add up to one in expectation only. Of a client that was drawn and drops out
the weight is lost: where a share of all jobs dies, steps are as much shorter on average.

Letters: N clients, A of them present, S of these chosen; pi_i the chance of client i to be among them, v_i its change.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import isclose
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Fold, choose, weigh
from fedsim.strategies.selection.base import Among, Known, Selection

SURE = 1 - 1e-9  # a chance that is one but for rounding: two points may not fall into one interval


@dataclass(frozen=True, kw_only=True)
class Uniform(Selection):
    """Everybody with the same chance."""

    def choose(self, known: Known, among: Among, rng: np.random.Generator) -> tuple[Tensor, Known]:
        return choose(among.clients, among.count, rng), known


class Weighing(Selection):
    """S distinct clients with chances in proportion to a size, as far as no chance exceeds one; unbiased weights."""

    weighs: ClassVar[bool] = True

    @abstractmethod
    def sizes(self, among: Among) -> Tensor:
        """[A] float64, at least 0: what the chances are proportional to."""

    def chances(self, among: Among) -> Tensor:
        """pi [A] float64."""
        return chances(self.sizes(among), among.count)

    def choose(self, known: Known, among: Among, rng: np.random.Generator) -> tuple[Tensor, Known]:
        return among.clients[systematic(self.chances(among), rng)], known

    def weights(self, fold: Fold | None, among: Among, ids: Tensor) -> Tensor | None:
        assert fold is not None, "a rule that does not fold is refused"
        p, rows = weigh(fold, among.num_examples[among.clients]), torch.searchsorted(among.clients, ids)
        return p[rows] / self.chances(among)[rows]


@dataclass(frozen=True, kw_only=True)
class BySamples(Weighing):
    """In proportion to samples, with weights that keep the mean unbiased; a client without any is not drawn."""

    def sizes(self, among: Among) -> Tensor:
        return among.samples


@dataclass(frozen=True, kw_only=True)
class Fixed(Weighing):
    """In proportion to given probabilities, with weights that keep the mean unbiased.

    Args:
        probabilities: one a client, in the order of their ids; they sum to one. A client of more than 1 / S is always
            drawn, and the others share the rest.
    """

    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(p > 0 for p in self.probabilities):
            raise ValueError(
                f"probabilities must all be positive, got {min(self.probabilities):g}: of a client that never takes "
                "part no mean is unbiased"
            )
        if not isclose(total := sum(self.probabilities), 1.0, abs_tol=1e-6):
            raise ValueError(f"probabilities must sum to 1, these sum to {total:g}")

    def start(self, num_clients: int, count: int) -> Known:
        if len(self.probabilities) != num_clients:
            raise ValueError(f"got {len(self.probabilities)} probabilities for {num_clients} clients; give one each")
        return {}

    def sizes(self, among: Among) -> Tensor:
        return torch.tensor(self.probabilities, dtype=torch.float64)[among.clients]


def chances(sizes: Tensor, count: int) -> Tensor:
    """pi [A] float64: min(1, c * size) with the c by which they sum to `count`, or to the clients of positive size.

    Where nobody has a size all chances are alike.

    >>> chances(torch.tensor([1.0, 1.0, 2.0, 8.0]), 2)
    tensor([0.2500, 0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    sizes = sizes.to(torch.float64)
    if not bool((sizes > 0).any()):
        sizes = torch.ones_like(sizes)
    if int((sizes > 0).sum()) <= count:
        return (sizes > 0).to(torch.float64)
    rest, num_full = sizes, 0
    while True:
        pi = rest * ((count - num_full) / rest.sum())
        if float(pi.max()) <= 1:
            return torch.where(rest == sizes, pi, 1.0) if num_full else pi
        over = pi > 1
        rest, num_full = torch.where(over, 0.0, rest), num_full + int(over.sum())


def systematic(pi: Tensor, rng: np.random.Generator) -> Tensor:
    """Places drawn with chances pi [A], which sum to a whole number: so many, ascending.

    In random order each takes an interval as long as its chance; those are drawn in whose intervals one of the points
    u, u + 1, u + 2, ... falls (Madow. On the theory of systematic sampling, II. Ann. Math. Stat. 20, 1949).
    """
    sure = pi > SURE
    if not bool(((pi > 0) & ~sure).any()):
        return torch.nonzero(sure).flatten()
    return places(pi, rng.permutation(len(pi)), rng.random())


def places(pi: Tensor, order: np.ndarray, u: float) -> Tensor:
    """Those drawn by `systematic` for an order and a start u in [0, 1), and those that always are."""
    sure = (pi > SURE).numpy()
    order = order[~sure[order]]
    ends = np.cumsum(pi.numpy()[order])
    count = round(float(ends[-1]))
    inside = np.searchsorted(ends * (count / ends[-1]), u + np.arange(count), side="right")
    sure[order[np.minimum(inside, len(order) - 1)]] = True
    return torch.from_numpy(np.flatnonzero(sure))
