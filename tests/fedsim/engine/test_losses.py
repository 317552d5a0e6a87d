"""Losses against numbers worked out by hand."""

from __future__ import annotations

from math import log

import pytest
import torch

from fedsim.engine.head import loss_and_gradient
from fedsim.engine.losses import cross_entropy, sample_shares, stablemax


def test_cross_entropy_of_even_logits_is_log_of_the_classes() -> None:
    assert cross_entropy(torch.zeros(2, 5), torch.tensor([0, 3])).tolist() == pytest.approx([log(5)] * 2)


def test_stablemax_by_hand() -> None:
    # s(2) = 3, s(-1) = 1/2, s(0) = 1: shares 6/9, 1/9, 2/9
    logits = torch.tensor([[2.0, -1.0, 0.0]]).expand(3, 3)
    losses = stablemax(logits, torch.tensor([0, 1, 2]))
    assert losses.tolist() == pytest.approx([log(9 / 6), log(9), log(9 / 2)])


def test_stablemax_has_a_finite_gradient_everywhere() -> None:
    z = torch.tensor([[1.0, 0.0, -3.0, 1e30]], requires_grad=True)
    stablemax(z, torch.tensor([1])).sum().backward()
    assert z.grad is not None and bool(z.grad.isfinite().all())


def test_a_sequence_counts_as_the_mean_over_its_positions() -> None:
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2], [3, 3, 3]])
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 3)
    assert torch.allclose(cross_entropy(logits, targets), each.mean(1))


def test_shares_sum_to_one_or_are_zero() -> None:
    shares = sample_shares(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 1.0, 1.0]]), torch.zeros(3, 3))
    assert shares.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.5, 0.25, 0.25]]


def test_the_gradient_of_cross_entropy_is_softmax_less_the_target() -> None:
    # two classes with logits 0 and log 3: shares 1/4 and 3/4; two samples of weight one half each
    logits = torch.tensor([[0.0, log(3)], [0.0, log(3)]])
    loss, grad = loss_and_gradient(cross_entropy, logits, torch.tensor([0, 1]), None, lead=0)
    assert float(loss) == pytest.approx((log(4) + log(4 / 3)) / 2)
    assert grad.flatten().tolist() == pytest.approx([-3 / 8, 3 / 8, 1 / 8, -1 / 8])
