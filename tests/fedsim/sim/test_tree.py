"""Sums along the tree against a plain recursive sum, whoever adds what and in whatever order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.sim.tree import TreeSum, joins, shares, top


def leaves(count: int) -> list[Tensor]:
    """Vectors whose sums differ with every other place of the brackets."""
    return list(
        torch.randn(count, 50, generator=torch.Generator().manual_seed(count)) * 10.0 ** torch.arange(-3, 2).repeat(10)
    )


def recursive(values: list[Tensor], size: int) -> Tensor | None:
    """The sum over the first `size` places, a power of two: one half plus the other, where there is any."""
    if size == 1 or not values:
        return values[0] if values else None
    left, right = recursive(values[: size // 2], size // 2), recursive(values[size // 2 :], size // 2)
    return left if right is None or left is None else left + right


@given(st.integers(1, 70), st.randoms(use_true_random=False))
def test_leaves_in_any_order_give_the_recursive_sum(count: int, random: object) -> None:
    values, order = leaves(count), list(range(count))
    random.shuffle(order)  # type: ignore[attr-defined]
    tree = TreeSum(count)
    for leaf in order:
        tree.add((0, leaf), {"x": values[leaf].clone()})
    wanted = recursive(values, 128)
    assert wanted is not None
    assert torch.equal(tree.root["x"], wanted)


def test_the_brackets_are_those_of_the_tree() -> None:
    tiny, huge = 1.0, float(2**24)  # huge + tiny is huge, huge + (tiny + tiny) is not
    for values, total in (
        ([huge, tiny, tiny], huge),
        ([tiny, tiny, huge, tiny], huge + 2),
        ([huge, 0.0, tiny, tiny], huge + 2),
    ):
        tree = TreeSum(len(values))
        for leaf, value in enumerate(values):
            tree.add((0, leaf), {"x": torch.tensor(value)})
        assert float(tree.root["x"]) == total


def test_from_the_left_at_most_one_node_a_level_is_open() -> None:
    tree = TreeSum(64)
    for leaf, value in enumerate(leaves(64)):
        tree.add((0, leaf), {"x": value.clone()})
        assert len(tree.nodes) == (leaf + 1).bit_count()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=70), st.integers(1, 9))
def test_workers_that_join_their_nodes_give_the_sum_of_one(costs: list[int], num_workers: int) -> None:
    bounds = shares(costs, num_workers)
    assert bounds[0] == 0 and bounds[-1] == len(costs) and bounds == sorted(bounds) and len(bounds) == num_workers + 1
    values = leaves(len(costs))
    trees = [TreeSum(len(costs)) for _ in range(num_workers)]
    for worker, tree in enumerate(trees):
        for leaf in range(bounds[worker], bounds[worker + 1]):
            tree.add((0, leaf), {"x": values[leaf].clone()})
        assert len(tree.nodes) <= 2 * top(len(costs)) + 1
    sent = 0
    for node, sender, receiver in joins(bounds):
        trees[receiver].add(node, trees[sender].nodes.pop(node))
        sent += 1
    first = next(w for w in range(num_workers) if bounds[w + 1] > 0)
    assert sum(bool(tree.nodes) for tree in trees) == 1
    wanted = recursive(values, 128)
    assert wanted is not None
    assert torch.equal(trees[first].root["x"], wanted)


def test_nothing_sums_to_nothing() -> None:
    assert TreeSum(0).root == {}
    assert list(joins(shares([], 3))) == []
