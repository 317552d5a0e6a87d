"""A combination is the sum of its terms, whether it is formed or folded."""

from __future__ import annotations

import pytest
import torch

from fedsim.clients.combination import Combination


def test_the_weighted_sum_is_that_of_the_formed_rows() -> None:
    a, b, shared = torch.rand(4, 7), torch.rand(4, 7), torch.rand(7)
    each = torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    combination = Combination.of((0.5, shared), (each, a), (-1.0, b)) * 2.0
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = 2 * (0.5 * shared + each[:, None].float() * a - b)
    torch.testing.assert_close(combination.dense(), expected)
    torch.testing.assert_close(combination.weighted_sum(weights), weights.float() @ expected)
    assert len(combination) == 4


def test_terms_of_two_precisions_are_summed_in_the_higher() -> None:
    combination = Combination.of((1.0, torch.ones(2, 3)), (1.0, torch.full((2, 3), 1e-12, dtype=torch.float64)))
    for value in (combination.dense()[0], combination.weighted_sum(torch.tensor([1.0, 0.0]))):
        assert (value - 1).tolist() == pytest.approx([1e-12] * 3, rel=1e-3)
