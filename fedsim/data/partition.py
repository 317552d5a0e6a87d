"""How the rows of a data set are given to clients.

An entry of PARTITIONS is a frozen dataclass called as `(data, num_clients, rng)`, which returns (order [m], offsets
[N+1]): client i owns the training rows `order[offsets[i]:offsets[i+1]]`, in random order. All recipes are vectorised
over clients. Clients without samples are ordinary. Unless a recipe says otherwise, every row goes to exactly one
client.

Letters: n rows, N clients, K classes, m entries of the order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from fedsim.data.checks import check_alpha, check_least
from fedsim.data.dataset import Dataset
from fedsim.data.splitting import (
    by_class,
    dirichlet,
    draw_classes,
    even_cuts,
    group,
    offsets_of,
    repeat_owners,
    round_shares,
    small,
    until_enough,
)

Split = tuple[np.ndarray, np.ndarray]


class Partition(Protocol):
    """A recipe that gives rows to clients."""

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        """(order [m] int64, offsets [N+1] int64); a ValueError if the data does not suit the recipe."""


@dataclass(frozen=True, kw_only=True)
class Iid:
    """Rows dealt out at random, sizes equal to within one."""

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        n = len(data)
        return rng.permutation(n), even_cuts(n, num_clients)


@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Every class is split over the clients by a draw from Dir(alpha): small alpha, few classes and uneven sizes.

    Yurochkin et al. Bayesian Nonparametric Federated Learning of Neural Networks. arXiv:1905.12022, section 4.
    Departure: counts are rounded by systematic sampling, so that their expectation is exactly the drawn share.

    Args:
        alpha: 0 gives each class to a single client.
        min_examples: draw again until every client has this many.
    """

    alpha: float
    min_examples: int = 0

    def __post_init__(self) -> None:
        check_alpha("dirichlet", self.alpha)
        check_least("dirichlet.", 0, min_examples=self.min_examples)

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        rows, starts = by_class(data, "dirichlet", rng)

        def owners() -> np.ndarray:
            shares = (dirichlet(self.alpha, num_clients, 1, rng)[0] for _ in range(data.num_classes))
            sizes = (round_shares(p, b - a, rng) for p, (a, b) in zip(shares, pairwise(starts), strict=True))
            return np.concatenate([repeat_owners(counts) for counts in sizes])

        owner = until_enough(owners, num_clients, self.min_examples, "dirichlet")
        return group(rows, owner, num_clients, rng)


@dataclass(frozen=True, kw_only=True)
class DirichletClient:
    """Clients of equal size, each with its own mix of classes drawn from Dir(alpha).

    Hsu, Qi, Brown. Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification.
    arXiv:1909.06335, section 3; with replacement, the recipe of arXiv:2206.10189's experiments. Departure: where a
    class runs out, the paper's later clients go without it; here all clients that ask for it compete, and those that
    lose draw again from what is left, so the order of clients does not matter.

    Args:
        alpha: 0 gives each client a single class, as far as the classes last.
        with_replacement: rows are drawn independently, so a client keeps its mix exactly; a row may then belong to
            several clients, several times to one, or to none.
    """

    alpha: float
    with_replacement: bool = False

    def __post_init__(self) -> None:
        check_alpha("dirichlet_client", self.alpha)

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        rows, starts = by_class(data, "dirichlet_client", rng)
        supply = np.diff(starts)
        mix = np.zeros((num_clients, data.num_classes))
        present = np.flatnonzero(supply)  # a class without rows has no share in a mix
        mix[:, present] = dirichlet(self.alpha, len(present), num_clients, rng)
        offsets = even_cuts(len(rows), num_clients)
        owner = repeat_owners(np.diff(offsets))
        if self.with_replacement:
            wanted = draw_classes(mix, supply, owner, rng)
            return rows[starts[wanted] + (rng.random(len(wanted)) * supply[wanted]).astype(np.int64)], offsets
        slots = np.arange(len(rows))  # entries of the order that wait for a row
        order, used = np.empty_like(rows), np.zeros_like(supply)
        while len(slots):
            wanted = draw_classes(mix, supply - used, owner[slots], rng)
            asked = slots[np.argsort(small(wanted, data.num_classes), kind="stable")]
            lost = []
            for k, (a, b) in enumerate(pairwise(offsets_of(wanted, data.num_classes))):
                take = min(b - a, supply[k] - used[k])
                winners = asked[a:b] if take == b - a else rng.permutation(asked[a:b])
                first = starts[k] + used[k]
                order[winners[:take]] = rows[first : first + take]
                used[k] += take
                lost.append(winners[take:])
            slots = np.sort(np.concatenate(lost))
        return order, offsets


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Rows sorted by class and cut into equal shards, a few random shards for each client.

    McMahan, Moore, Ramage, Hampson, y Arcas. Communication-Efficient Learning of Deep Networks from Decentralized
    Data. arXiv:1602.05629, section 3.

    Args:
        shards_per_client: 2 in the paper, which gives most clients two classes.
    """

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        check_least("shards.", 1, shards_per_client=self.shards_per_client)

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        rows, _ = by_class(data, "shards", rng)
        holder = rng.permutation(np.repeat(np.arange(num_clients, dtype=np.int32), self.shards_per_client))
        owner = np.repeat(holder, np.diff(even_cuts(len(rows), len(holder))))
        return group(rows, owner, num_clients, rng)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Every client holds exactly this many classes; a class is shared evenly by the clients that hold it.

    Li, Diao, Chen, He. Federated Learning on Non-IID Data Silos: An Experimental Study. arXiv:2102.02079, "#C = k".
    With fewer clients than classes a class may be held by nobody, and its rows are then not used.

    Args:
        classes_per_client: k.
    """

    classes_per_client: int

    def __post_init__(self) -> None:
        check_least("classes.", 1, classes_per_client=self.classes_per_client)

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        rows, starts = by_class(data, "classes", rng)
        present = np.flatnonzero(np.diff(starts))
        k = self.classes_per_client
        if k > len(present):
            raise ValueError(f"classes.classes_per_client={k}, but the data has {len(present)} classes; lower it")
        score = rng.random((num_clients, len(present)))
        # one class of each client goes round robin, so that every class has a holder
        score[np.arange(num_clients), rng.permutation(num_clients) % len(present)] = -1
        held = np.argpartition(score, k - 1, axis=1)[:, :k]
        parts, owners = [], []
        for i, label in enumerate(present):
            holders = rng.permutation(np.flatnonzero((held == i).any(axis=1)))
            if len(holders):
                a, b = starts[label], starts[label + 1]
                parts.append(rows[a:b])
                owners.append(np.repeat(holders.astype(np.int32), np.diff(even_cuts(b - a, len(holders)))))
        return group(np.concatenate(parts), np.concatenate(owners), num_clients, rng)


@dataclass(frozen=True, kw_only=True)
class QuantitySkew:
    """The same classes everywhere, sizes drawn from Dir(alpha): small alpha, few clients with most of the data.

    Li, Diao, Chen, He. Federated Learning on Non-IID Data Silos: An Experimental Study. arXiv:2102.02079, "quantity
    skew".

    Args:
        alpha: 0 gives everything to a single client.
        min_examples: draw again until every client has this many.
    """

    alpha: float
    min_examples: int = 0

    def __post_init__(self) -> None:
        check_alpha("quantity_skew", self.alpha)
        check_least("quantity_skew.", 0, min_examples=self.min_examples)

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        def owners() -> np.ndarray:
            shares = dirichlet(self.alpha, num_clients, 1, rng)[0]
            return repeat_owners(round_shares(shares, len(data), rng))

        owner = until_enough(owners, num_clients, self.min_examples, "quantity_skew")
        return rng.permutation(len(data)), offsets_of(owner, num_clients)


@dataclass(frozen=True, kw_only=True)
class Natural:
    """One client for each natural owner of the data: a speaker, a hospital, a file. Rows keep their order."""

    def __call__(self, data: Dataset, num_clients: int, rng: np.random.Generator) -> Split:
        if data.groups is None:
            raise ValueError(
                "partition natural: the data names no clients; add client keys or choose another partition"
            )
        groups = data.groups.numpy()
        if groups.max(initial=-1) >= num_clients:
            raise ValueError(f"partition natural: the data has {groups.max() + 1} clients, not {num_clients}")
        return np.argsort(groups, kind="stable"), offsets_of(groups, num_clients)


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "dirichlet_client": DirichletClient,
    "shards": Shards,
    "classes": Classes,
    "quantity_skew": QuantitySkew,
    "natural": Natural,
}
