"""Who hears whom: sums along a sparse graph beside products with the whole matrix, and what is lost on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.graph import Graph, everybody


def drawn(n: int, share: float, seed: int) -> Graph:
    """A random graph whose pairs hear each other."""
    g = torch.Generator().manual_seed(seed)
    links = (torch.rand(n, n, generator=g) < share).triu(1)
    return Graph.of(n, (links | links.T).nonzero().T)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 2**16))
def test_a_mix_is_the_product_with_the_matrix(n: int, share: float, seed: int) -> None:
    graph, v = drawn(n, share, seed), torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).double()
    matrix = graph.dense(n)
    torch.testing.assert_close(matrix.sum(1), torch.ones(n).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-15)
    torch.testing.assert_close(graph.mix(v), matrix @ v, rtol=0, atol=1e-12)
    some = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2 + 1]
    torch.testing.assert_close(graph.rows(some).mix(v), (matrix @ v)[some], rtol=0, atol=1e-12)
    there = graph.among(some).dense(len(some))
    torch.testing.assert_close(there, there.T, rtol=0, atol=1e-15)
    off = ~torch.eye(len(some)).bool()
    assert torch.equal(there[off], matrix[some][:, some][off])  # what is not heard is one's own
    torch.testing.assert_close(there.sum(1), torch.ones(len(some)).double(), rtol=0, atol=1e-12)


def test_metropolis_weights_by_hand() -> None:
    path = Graph.of(3, torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))  # degrees 1, 2, 1
    third = 1 / 3
    expected = torch.tensor([[2 * third, third, 0], [third, third, third], [0, third, 2 * third]]).double()
    torch.testing.assert_close(path.dense(3), expected, rtol=0, atol=1e-7)
    uniform = Graph.of(3, torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), "uniform").dense(3)
    assert uniform[0].tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("n", [6, 40], ids=["a product of matrices", "sums"])
def test_a_row_that_is_not_finite_reaches_only_those_that_hear_it(n: int) -> None:
    i = torch.arange(n)
    ring = Graph.of(n, torch.cat([torch.stack([i, (i + 1) % n]), torch.stack([(i + 1) % n, i])], 1))
    assert ring.is_dense(n) == (n == 6)
    for bad in (torch.nan, torch.inf):
        v = torch.ones(n, 2)
        v[3, 1] = bad
        touched = ~ring.mix(v).isfinite().all(1)
        assert touched.nonzero().flatten().tolist() == [2, 3, 4]


def test_ranks_are_those_among_what_one_hears_and_ties_go_to_the_lower() -> None:
    graph = everybody(3).rows(torch.tensor([0, 1]))
    assert graph.ranks(torch.tensor([5.0, 1.0, 5.0, 2.0, 2.0, 1.0])).tolist() == [1, 0, 2, 1, 2, 0]


def test_a_link_lost_both_ways_keeps_the_sum() -> None:
    graph, v = drawn(8, 0.6, 3), torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double()
    lost = (graph.hearers * graph.peers % 5 == 2) & ~graph.is_own
    assert bool(lost.any())
    torch.testing.assert_close(graph.without(lost).mix(v).sum(0), v.sum(0), rtol=0, atol=1e-12)
