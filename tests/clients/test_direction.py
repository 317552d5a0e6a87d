"""Directions: sums of gradients and tensors written as formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.clients.direction import GRADIENT, Direction, gradient_at
from fedsim.terms import Terms

G = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
THERE = torch.tensor([[0.5, 0.5], [-1.0, 4.0]])
C_I = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
C = torch.tensor([10.0, 20.0])
POINT = torch.zeros(2)
NUMBERS = st.floats(-3, 3)


def value(terms: Terms, g: Tensor = G, there: Tensor = THERE) -> Tensor:
    """What the direction is where the gradient is g, and `there` at the other point."""
    u = Direction.of(terms)
    shift = torch.zeros(2) if u.shift is None else u.shift
    return u.scale * g + u.other_scale * there + shift


def test_the_gradient_itself() -> None:
    assert torch.equal(value(GRADIENT), G)


@given(NUMBERS, NUMBERS)
@settings(max_examples=30, deadline=None)
def test_a_formula_means_what_it_says(beta: float, rho: float) -> None:
    u = beta * (GRADIENT - C_I + C) + (1 - beta) * C
    torch.testing.assert_close(value(u), beta * (G - C_I + C) + (1 - beta) * C)
    u = GRADIENT - beta * (C_I - C) + rho * (C - gradient_at(POINT))
    torch.testing.assert_close(value(u), G - beta * (C_I - C) + rho * (C - THERE))
    u = C - GRADIENT * rho
    torch.testing.assert_close(value(u), C - G * rho)
    u = -(rho * gradient_at(POINT) - beta * GRADIENT) - gradient_at(POINT)
    torch.testing.assert_close(value(u), beta * G - rho * THERE - THERE)


def test_rows_of_the_shift_follow_the_clients_that_still_step() -> None:
    each, common = Direction.of(GRADIENT - C_I), Direction.of(GRADIENT + C)
    rows, shared = each.rows(1), common.rows(1)
    assert rows is not None and torch.equal(rows, -C_I[:1])
    assert shared is not None and torch.equal(shared, C)
    assert Direction.of(GRADIENT).rows(1) is None


def test_one_other_point_only() -> None:
    other = torch.ones(2)
    with pytest.raises(ValueError, match="one other point only"):
        Direction.of(gradient_at(POINT) + gradient_at(other))
    assert Direction.of(gradient_at(POINT) + gradient_at(POINT)).other_scale == 2.0
