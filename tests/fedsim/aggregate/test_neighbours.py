from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.aggregate.distances import FAR, squared_distances
from fedsim.aggregate.neighbours import nearest_neighbour_average
from fedsim.graph import Graph


def directly(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double()[:, None] - b.double()).square().sum(-1)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7])
def test_distances_survive_a_large_common_offset(offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    v = offset + torch.randn(12, 3000, generator=g)
    assert torch.allclose(squared_distances(v, v), directly(v, v), rtol=1e-9, atol=0.0)
    assert torch.allclose(squared_distances(v[:5], v), directly(v[:5], v), rtol=1e-9, atol=0.0)


def test_one_huge_row_does_not_blur_the_distances_between_the_others() -> None:
    v = torch.randn(9, 500, generator=torch.Generator().manual_seed(0))
    for huge in range(9):
        w = v.clone()
        w[huge] = 1e30
        assert torch.allclose(squared_distances(w, w), directly(w, w), rtol=1e-9, atol=0.0)


def test_rows_close_together_and_far_from_the_rest_are_told_apart() -> None:
    v = torch.randn(8, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v[6:] = 1e6 + 1e-3 * v[6:]
    assert torch.allclose(squared_distances(v, v), directly(v, v), rtol=1e-9, atol=0.0)


def test_equal_rows_are_at_distance_zero_and_bad_rows_far_away() -> None:
    v = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    v[3] = v[1]
    v[4, 7], v[5, 9] = torch.nan, -torch.inf
    d = squared_distances(v, v)
    assert d[1, 3] == d[3, 1] == 0.0 and not d[:4, :4].diagonal().any()
    assert bool((d[4:] == FAR).all() and (d[:, 4:] == FAR).all() and (d[:4, :4] < 1e3).all())
    assert bool((squared_distances(v.clone(), v)[:4, :4] == d[:4, :4]).diagonal().all())


def test_no_finite_row_is_no_error() -> None:
    v = torch.full((2, 3), torch.nan)
    assert bool((squared_distances(v, v) == FAR).all())


def hearing(heard: torch.Tensor) -> Graph:
    """The graph of a matrix [C, M] bool of who heard whom."""
    counts, peers = heard.sum(1), heard.nonzero()[:, 1]
    start = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    own = torch.arange(len(heard))
    return Graph(start, peers, torch.ones(len(peers)).double(), own, torch.zeros_like(own))


def one_client(pivot, sent, heard, keep):  # type: ignore[no-untyped-def]
    """The rule in plain words, for one client."""
    ranked = sorted(
        (i for i, h in enumerate(heard) if h), key=lambda i: (float(directly(pivot[None], sent[i : i + 1])), i)
    )
    return sent[ranked[:keep]].mean(dim=0)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 9), entries=st.integers(1, 5), seed=st.integers(0, 2**16), data=st.data())
def test_it_equals_the_rule_client_by_client_ties_included(n: int, entries: int, seed: int, data) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    sent = torch.randint(-2, 3, (n, entries), generator=g).double()
    heard = torch.rand(n, n, generator=g) < 0.7
    heard.fill_diagonal_(True)
    keep = data.draw(st.integers(1, int(heard.sum(dim=1).min())))
    got = nearest_neighbour_average(sent, sent, hearing(heard), keep)
    for i in range(n):
        assert torch.allclose(got[i], one_client(sent[i], sent, heard[i], keep))


def test_everyone_kept_is_the_plain_mean() -> None:
    sent = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    got = nearest_neighbour_average(sent[2:5], sent, hearing(torch.ones(3, 7).bool()), 7)
    assert torch.allclose(got, sent.mean(dim=0).expand(3, -1), rtol=0, atol=1e-6)


def test_a_vector_that_is_not_finite_is_kept_last() -> None:
    sent = torch.tensor([[0.0], [torch.nan], [1.0], [torch.inf], [5.0]])
    everyone = hearing(torch.ones(1, 5).bool())
    assert nearest_neighbour_average(sent[:1], sent, everyone, 3).tolist() == [[2.0]]
    assert nearest_neighbour_average(sent[:1], sent, everyone, 4).isnan().all()
    assert nearest_neighbour_average(sent[1:2], sent, everyone, 2).isnan().all()
    unheard = hearing(torch.tensor([[True, True, True, False, False]]))
    assert nearest_neighbour_average(sent[:1], sent, unheard, 2).tolist() == [[0.5]]


def test_too_few_vectors_are_refused() -> None:
    sent = torch.zeros(4, 2)
    heard = hearing(torch.tensor([[True, True, False, False]]))
    with pytest.raises(ValueError, match="keep=3 exceeds the 2 vectors a client heard"):
        nearest_neighbour_average(sent[:1], sent, heard, 3)
    with pytest.raises(ValueError, match="keep=0"):
        nearest_neighbour_average(sent[:1], sent, heard, 0)


@pytest.mark.parametrize(("n", "f"), [(11, 1), (26, 2)])
def test_mixing_contracts_within_the_stated_constants(n: int, f: int) -> None:
    """MoNNA's reduction: spread and shift of the mixed vectors, for n >= 11 f, against three attacks."""
    g = torch.Generator().manual_seed(n)
    alpha, shift = 9.88 * f / (n - f), 9.0 * f / (n - f)
    for trial in range(60):
        honest = torch.randn(n - f, 1 + trial % 4, generator=g, dtype=torch.float64)
        honest[: 1 + trial % 5] *= 4.0
        spread = float((honest - honest.mean(0)).square().sum(1).mean())
        lie = (-honest.mean(0), honest.mean(0) + 1.5 * honest.std(0), honest[0] + 2 * sqrt(spread))[trial % 3]
        sent = torch.cat([honest, lie.expand(f, -1)])
        mixed = nearest_neighbour_average(honest, sent, hearing(torch.ones(n - f, n).bool()), n - f)
        assert float((mixed - mixed.mean(0)).square().sum(1).mean()) <= alpha * spread
        assert float((mixed.mean(0) - honest.mean(0)).square().sum()) <= shift * spread
