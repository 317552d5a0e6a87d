"""Adaptive QSGD: its levels are the best for the vector."""

import pytest
import torch
from torch import Tensor

from fedsim.compress.adaptive import AdaptiveQSGD
from tests.build import streams


def variance(x: Tensor, level: Tensor) -> float:
    """Of rounding entries x [P] in [0, 1] at random to levels [s + 1], by the book."""
    total = 0.0
    for entry in x.tolist():
        a = max(v for v in level.tolist() if v <= entry)
        b = min(v for v in level.tolist() if v >= entry)
        total += (entry - a) * (b - entry)
    return total


def levels_of(v: Tensor, count: int) -> Tensor:
    sent = AdaptiveQSGD(levels=count).encode(v[None], streams(1)).payload["levels"][0]
    return torch.cat([sent.new_zeros(1), sent, sent.new_ones(1)])


def test_two_levels_are_the_best_that_trying_every_entry_finds() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        v = torch.randn(12, generator=g, dtype=torch.float64)
        x = (v / v.norm()).abs()
        tried = min(variance(x, torch.tensor([0.0, float(at), 1.0], dtype=torch.float64)) for at in x)
        assert variance(x, levels_of(v, 2)) == pytest.approx(tried, abs=1e-12)


def test_many_levels_have_a_fraction_of_the_variance_of_qsgds() -> None:
    v = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, level = (v / v.norm()).abs(), levels_of(v, 8)
    assert bool((level.diff() >= 0).all())
    assert variance(x, level) < 0.2 * variance(x, torch.linspace(0, 1, 9, dtype=torch.float64))


def test_entries_of_few_sizes_come_back_exactly() -> None:
    v = torch.tensor([[3.0, -3.0, 0.0, 1.0, 1.0, 0.0, -1.0, 0.0]])
    assert torch.allclose(AdaptiveQSGD(levels=3).encode(v, streams(1)).decode(), v, atol=1e-6)
    assert AdaptiveQSGD(levels=3).bits(8) == 32 + 2 * 32 + 8 * 3


def test_its_number_of_levels_is_checked() -> None:
    with pytest.raises(ValueError, match="1..255"):
        AdaptiveQSGD(levels=256)
