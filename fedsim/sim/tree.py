"""Sums along a fixed binary tree: the same bits whoever adds which part, and in whatever order parts come.

Float sums depend on where the brackets stand. Here the place of a leaf fixes them: node (k, i) is the sum of the leaves
from i * 2^k up to (i + 1) * 2^k, its left half plus its right half, and what lies past the last leaf does not exist.
Leaves that come from the left leave at most one open node a level, like the digits of a binary counter.

Letters: G leaves, W workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from torch import Tensor

Node = tuple[int, int]  # (level, place): the leaves from place << level up to (place + 1) << level
Sums = dict[str, Tensor]


class TreeSum:
    """Named sums over the leaves that were added so far, as the fewest nodes of the tree that they fill.

    Args:
        num_leaves: G of the whole tree, of which this may get only some.

    >>> import torch
    >>> tree = TreeSum(5)
    >>> for leaf in (3, 0, 1, 4):
    ...     tree.add((0, leaf), {"x": torch.tensor([float(leaf)])})
    >>> sorted(tree.nodes)
    [(0, 3), (1, 0), (2, 1)]
    >>> tree.add((0, 2), {"x": torch.tensor([2.0])})
    >>> tree.root
    {'x': tensor([10.])}
    """

    def __init__(self, num_leaves: int) -> None:
        self.num_leaves = num_leaves
        self.nodes: dict[Node, Sums] = {}
        self._top = top(num_leaves)

    def add(self, node: Node, sums: Sums) -> None:
        """Take the sum of a node, which this may write to, and join it with its neighbours as far as they are there."""
        level, place = node
        while level < self._top:
            if (place ^ 1) << level < self.num_leaves:  # it has a neighbour
                if (other := self.nodes.pop((level, place ^ 1), None)) is None:
                    break
                left, right = (other, sums) if place & 1 else (sums, other)
                add_(left, right)
                sums = left
            level, place = level + 1, place >> 1
        self.nodes[level, place] = sums

    @property
    def root(self) -> Sums:
        """{name: sum over all leaves}; nothing if there are none."""
        assert self.nodes.keys() <= {(self._top, 0)}, "some leaves are missing"
        return self.nodes.get((self._top, 0), {})


def top(num_leaves: int) -> int:
    """The level of the root."""
    return max(num_leaves - 1, 0).bit_length()


def add_(into: Sums, sums: Mapping[str, Tensor]) -> None:
    """Add sums to others of the same names, or set them where there were none."""
    for name, value in sums.items():
        if name in into:
            into[name] += value
        else:
            into[name] = value


def shares(costs: Sequence[float], num_workers: int) -> list[int]:
    """Cut a row of groups into one neighbouring range a worker, of costs as equal as that allows.

    Args:
        costs: [G] of each group.
        num_workers: W.

    Returns:
        [W + 1] bounds: worker w takes the groups from bounds[w] up to bounds[w + 1], none if there are too few.

    >>> shares([3, 3, 2, 2, 1, 1], 2), shares([9, 1, 1], 2), shares([1], 2)
    ([0, 2, 6], [0, 1, 3], [0, 1, 1])
    """
    before, bounds = [0.0, *accumulate(costs)], [0]
    for w in range(1, num_workers):
        aim = before[-1] * w / num_workers
        least = min(bounds[-1] + 1, len(costs))  # one group each, and one left for each that follows
        most = max(least, len(costs) - (num_workers - w))
        bounds.append(min(range(least, most + 1), key=lambda g: abs(before[g] - aim)))
    return [*bounds, len(costs)]


def joins(bounds: Sequence[int]) -> Iterator[tuple[Node, int, int]]:
    """How the workers' sums are joined, as every worker goes through it: in this order no two wait for each other.

    Args:
        bounds: [W + 1] what `shares` returned. A node belongs to the worker of its first leaf.

    Yields:
        (node, sender, receiver): the right half of a node whose left half is another worker's goes over to that one.

    >>> list(joins([0, 3, 4, 6]))
    [((0, 3), 1, 0), ((2, 1), 2, 0)]
    """
    num_leaves = bounds[-1]
    owner = [w for w in range(len(bounds) - 1) for _ in range(bounds[w], bounds[w + 1])]
    for level in range(top(num_leaves)):
        for place in range(1, num_leaves, 2):
            if (first := place << level) < num_leaves and owner[first] != (left := owner[(place - 1) << level]):
                yield (level, place), owner[first], left
