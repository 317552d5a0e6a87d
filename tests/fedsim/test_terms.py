"""A sum of terms is the same whether it is formed or folded, and forming it gives a tensor of its own."""

from __future__ import annotations

import pytest
import torch

from fedsim.terms import Terms

A, B, SHARED = torch.rand(4, 7), torch.rand(4, 7), torch.rand(7)
EACH = torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=torch.float64)


def test_the_weighted_sum_is_that_of_the_formed_rows() -> None:
    terms = (0.5 * Terms.of(SHARED) + Terms.of(A) * EACH - B) * 2.0
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = 2 * (0.5 * SHARED + EACH[:, None].float() * A - B)
    torch.testing.assert_close(terms.dense(), expected)
    torch.testing.assert_close(terms.weighted_sum(weights), weights.float() @ expected)
    assert len(terms) == 4


def test_it_is_an_algebra() -> None:
    torch.testing.assert_close((A - Terms.of(B)).dense(), A - B)
    torch.testing.assert_close((-(Terms.of(B) - SHARED) * 3).dense(), 3 * (SHARED - B))
    torch.testing.assert_close((SHARED + Terms.of(SHARED)).dense(), 2 * SHARED)


@pytest.mark.parametrize("terms", [Terms.of(A), Terms.of(A) + SHARED, Terms.of(SHARED), Terms.of(A) * EACH])
def test_what_is_formed_is_nobody_elses_storage(terms: Terms) -> None:
    before = A.clone(), SHARED.clone()
    terms.dense().zero_()
    terms.weighted_sum(EACH).zero_() if any(t.ndim > 1 for _, t in terms.terms) else None
    assert torch.equal(A, before[0]) and torch.equal(SHARED, before[1])


def test_terms_of_two_precisions_are_summed_in_the_higher() -> None:
    terms = Terms.of(torch.ones(2, 3)) + torch.full((2, 3), 1e-12, dtype=torch.float64)
    for value in (terms.dense()[0], terms.weighted_sum(torch.tensor([1.0, 0.0]))):
        assert (value - 1).tolist() == pytest.approx([1e-12] * 3, rel=1e-3)
