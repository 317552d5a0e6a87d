"""The pieces that partitions are made of: sorting by class, drawing and rounding shares, grouping by owner.

Letters: n rows, N clients, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.trees import one

_TRIES = 100  # draws before min_examples is given up


def by_class(data: Dataset, name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Training rows sorted by class and in random order within a class, for the partition `name`.

    Returns:
        (rows [n], starts [K+1]): class k has rows[starts[k]:starts[k+1]].

    Raises:
        ValueError: for sequences, whose rows hold many classes.
    """
    targets = data.targets
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 1:
        what = "numbers" if one(targets).is_floating_point() else "sequences"
        raise ValueError(
            f"partition {name} sorts rows by their class, but the rows of this data are {what}, which have none; "
            f"choose iid, quantity_skew or natural"
        )
    labels = targets.numpy()
    shuffled = rng.permutation(len(labels))
    rows = shuffled[np.argsort(small(labels[shuffled], data.num_classes), kind="stable")]
    return rows, offsets_of(labels, data.num_classes)


def small(codes: np.ndarray, bound: int) -> np.ndarray:
    """Codes below a bound in the smallest type: numpy sorts 8 and 16 bits by radix, many times faster."""
    return codes.astype(np.min_scalar_type(max(bound - 1, 0)))


def offsets_of(owner: np.ndarray, num_owners: int) -> np.ndarray:
    """[num_owners+1]: where each owner's run would start if entries were sorted by owner."""
    return np.concatenate([[0], np.bincount(owner, minlength=num_owners).cumsum()]).astype(np.int64)


def even_cuts(n: int, parts: int) -> np.ndarray:
    """[parts+1] cuts of n entries into parts whose sizes differ by one at most.

    >>> even_cuts(7, 3).tolist()
    [0, 2, 4, 7]
    """
    return np.arange(parts + 1, dtype=np.int64) * n // parts


def repeat_owners(counts: np.ndarray) -> np.ndarray:
    """Owner i `counts[i]` times, as int32."""
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def group(
    rows: np.ndarray, owner: np.ndarray, num_clients: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(order, offsets) of rows and their owners; each client's rows come in random order."""
    shuffle = rng.permutation(len(rows))
    return rows[shuffle][np.argsort(owner[shuffle], kind="stable")], offsets_of(owner, num_clients)


def dirichlet(alpha: float, size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws, size] shares from the symmetric Dir(alpha); alpha = 0 is its limit, all for one drawn at random."""
    if alpha > 0:
        return rng.dirichlet(np.full(size, alpha), size=draws)
    shares = np.zeros((draws, size))
    shares[np.arange(draws), rng.integers(size, size=draws)] = 1
    return shares


def round_shares(shares: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers that add up to `total`, each with expectation `share * total` and within one of it.

    Systematic sampling: one uniform shift of the cumulative shares, so that no client is favoured by rounding.
    """
    cuts = np.floor(shares[:-1].cumsum() * total + rng.random()).astype(np.int64)
    return np.diff(np.minimum(cuts, total), prepend=0, append=total)


def draw_classes(mix: np.ndarray, supply: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A class for each entry from its owner's mix, restricted to the classes that are left.

    Args:
        mix: [N, K] shares.
        supply: [K] rows left of each class; an owner whose mix holds none of what is left draws in proportion to it.
        owner: [m] rows of `mix`, sorted.

    Returns:
        [m] int64 classes; within rounding error of the cumulative shares one without supply may be among them.
    """
    first = np.flatnonzero(np.diff(owner, prepend=-1))  # where each owner's run starts
    local = np.repeat(np.arange(len(first)), np.diff(first, append=len(owner)))
    left = mix[owner[first]] * (supply > 0)
    left = np.where(left.any(axis=1, keepdims=True), left, supply)
    cumulative = left.cumsum(axis=1)
    cumulative /= cumulative[:, -1:]
    # owner i's cumulative shares lie in (i, i+1], so all of them together are one sorted list
    cumulative += np.arange(len(first))[:, None]
    at = np.searchsorted(cumulative.ravel(), local + rng.random(len(owner)), "right")
    return np.clip(at - local * mix.shape[1], 0, mix.shape[1] - 1)


def until_enough(draw: Callable[[], np.ndarray], num_clients: int, least: int, name: str) -> np.ndarray:
    """Owners [n], drawn again until each has `least` rows.

    Raises:
        ValueError: if there are too few rows for that, or no draw gives them.
    """
    for _ in range(_TRIES):
        owner = draw()
        if not least:
            return owner
        if least * num_clients > len(owner):
            raise ValueError(
                f"{name}.min_examples={least} for {num_clients} clients needs {least * num_clients} rows, but there "
                f"are {len(owner)}; lower min_examples or clients.count"
            )
        if np.bincount(owner, minlength=num_clients).min() >= least:
            return owner
    raise ValueError(
        f"{name}.min_examples={least}: none of {_TRIES} draws gave every one of {num_clients} clients that many; raise "
        f"alpha, or lower min_examples or clients.count"
    )
