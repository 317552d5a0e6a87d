from collections import Counter

import pytest
import torch
from torch import Tensor

from fedsim.compress.sparsify import Bernoulli, RandK, TopK
from fedsim.compress.words import sample
from tests.build import streams


def largest(v: Tensor, k: int) -> Tensor:
    """[C, k]: where the entries stand that Top-K sends, in the order in which it sends them."""
    return TopK(k=k).encode(v, streams(len(v))).payload["index"].long()


@pytest.mark.parametrize(("entries", "bits"), [(1, 0), (2, 1), (3, 2), (1024, 10), (1025, 11)])
def test_an_index_costs_the_rounded_up_logarithm(entries: int, bits: int) -> None:
    assert TopK(k=1).bits(entries) == 32 + bits
    assert RandK(k=1).bits(entries) == 32 + bits
    assert RandK(k=1, shared_seed=True).bits(entries) == 32


def test_constants_of_the_table() -> None:
    assert RandK(k=5).omega(20) == 3.0 and RandK(k=5).delta(20) is None
    assert RandK(k=15).delta(20) == pytest.approx(1.5)  # omega = 1/3
    assert TopK(k=5).delta(20) == 4.0 and TopK(k=5).omega(20) is None
    assert Bernoulli(p=0.25).omega(20) == 3.0


def test_a_fraction_is_rounded_to_at_least_one_entry() -> None:
    assert TopK(fraction=0.01).delta(10) == 10.0
    assert TopK(fraction=0.26).delta(10) == pytest.approx(10 / 3)


def test_settings_out_of_range_say_what_to_do() -> None:
    for cls in (TopK, RandK):
        with pytest.raises(ValueError, match="exactly one of k and fraction"):
            cls()
        with pytest.raises(ValueError, match="fraction must be in"):
            cls(fraction=1.5)
        with pytest.raises(ValueError, match="at least 1"):
            cls(k=0)
        with pytest.raises(ValueError, match="k=9 exceeds the 8 entries"):
            cls(k=9).encode(torch.zeros(1, 8), streams(1))
    with pytest.raises(ValueError, match="probability"):
        Bernoulli(p=0.0)


def test_top_k_takes_the_first_of_equal_magnitudes() -> None:
    v = torch.tensor([[1.0, -2.0, 2.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0, 1.0]])
    assert largest(v, 2).tolist() == [[1, 2], [0, 1], [0, 1]]
    assert TopK(k=2).encode(v, streams(3)).decode()[0].tolist() == [0.0, -2.0, 2.0, 0.0, 0.0]


def test_top_k_takes_nan_then_infinity_before_numbers() -> None:
    v = torch.tensor([[1.0, torch.inf, 2.0, torch.nan]])
    assert largest(v, 1).tolist() == [[3]]
    assert largest(v, 2).tolist() == [[1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 300, 20_000, 40_000])
def test_top_k_of_a_long_row_equals_a_stable_sort(k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(k)
    few_values = torch.randint(-50, 50, (40_000,), generator=g).to(dtype)
    misleading = torch.where(torch.arange(40_000) % 61 == 0, 5.0, 1.0).to(dtype)  # the sample sees 5 only
    v = torch.stack([few_values, torch.randn(40_000, generator=g, dtype=dtype), misleading, 0 * misleading])
    expected = v.abs().sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(largest(v, k), expected)


def test_every_pair_of_entries_is_as_likely_a_sample_as_any_other() -> None:
    for entries, k in ((5, 2), (17, 2)):  # by ranks, and by draws
        drawn = sample(streams(20_000), entries, k, "x")
        counts = Counter(map(tuple, drawn.tolist()))
        pairs = entries * (entries - 1) // 2
        assert len(counts) == pairs
        mean = 20_000 / pairs
        # chi-squared with pairs - 1 degrees of freedom has this mean and deviation
        assert abs(sum((c - mean) ** 2 / mean for c in counts.values()) - (pairs - 1)) < 4 * (2 * pairs) ** 0.5


@pytest.mark.parametrize(("entries", "k"), [(1, 1), (8, 8), (1000, 3), (1000, 124), (1000, 126), (100_000, 1000)])
def test_a_sample_has_k_different_entries_whatever_the_stack(entries: int, k: int) -> None:
    drawn = sample(streams(6), entries, k, "x")
    assert drawn.shape == (6, k)
    assert bool((drawn[:, 1:] > drawn[:, :-1]).all()) and int(drawn.min()) >= 0 and int(drawn.max()) < entries
    assert torch.equal(sample(streams(6).rows([4]), entries, k, "x")[0], drawn[4])


def test_steps_and_clients_choose_differently() -> None:
    drawn = sample(streams(2), 10_000, 10, "x")
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(sample(streams(2), 10_000, 10, "x", step=1), drawn)


def test_clients_with_common_indices_send_the_same_entries_in_a_round_and_others_in_the_next() -> None:
    v, rule = torch.randn(4, 60), RandK(k=6, common=True)
    first, second = (rule.encode(v, streams(4, job=job)).decode() for job in (0, 1))
    assert int((first.mean(0) != 0).sum()) == 6 and rule.bits(60) == 6 * 32
    assert torch.equal(first != 0, (first[:1] != 0).expand(4, -1)) and not torch.equal(first != 0, second != 0)
