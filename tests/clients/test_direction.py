"""Directions: sums of gradients and tensors written as formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.clients.direction import GRADIENT, MODEL, Direction, gradient_at
from fedsim.terms import Terms

G = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
THERE = torch.tensor([[0.5, 0.5], [-1.0, 4.0]])
C_I = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
C = torch.tensor([10.0, 20.0])
Y = torch.tensor([[7.0, -2.0], [0.5, 3.0]])
POINT = torch.zeros(2)
NUMBERS = st.floats(-3, 3)


def value(terms: Terms, g: Tensor = G, there: Tensor = THERE) -> Tensor:
    """What the direction is at the local models Y, where the gradient is g, and `there` at the other point."""
    u = Direction.of(terms)
    beside = u.beside(Y, torch.empty_like)
    return u.scale * g + u.other_scale * there + (0.0 if beside is None else beside)


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
    torch.testing.assert_close(value(GRADIENT + rho * (MODEL - C)), G + rho * (Y - C))
    torch.testing.assert_close(value(beta * (GRADIENT - MODEL * rho) - C_I), beta * (G - rho * Y) - C_I)
    torch.testing.assert_close(value(GRADIENT + rho * MODEL), G + rho * Y)


def test_what_stands_beside_gradients_follows_the_clients_that_still_step() -> None:
    def first(u: Terms) -> Tensor | None:
        return Direction.of(u).beside(Y[:1], torch.empty_like)

    rows, shared, pulled = first(GRADIENT - C_I), first(GRADIENT + C), first(GRADIENT + 2.0 * MODEL - C_I)
    assert rows is not None and torch.equal(rows, -C_I[:1])
    assert shared is not None and torch.equal(shared, C)
    assert pulled is not None and torch.equal(pulled, 2 * Y[:1] - C_I[:1])
    assert first(GRADIENT) is None


def test_a_pull_towards_the_start_leaves_nothing_there() -> None:
    x = torch.tensor([0.1, 0.7])
    assert Direction.of(GRADIENT + 0.3 * (MODEL - x)).about(x) == ()
    assert Direction.of(GRADIENT - C_I + 0.3 * (MODEL - x)).about(x) == ((-1.0, C_I),)
    (weight, term), (own, start) = Direction.of(GRADIENT + 0.3 * (MODEL - C)).about(x)
    assert (weight, own) == (-0.3, 0.3) and term is C and start is x


def test_one_other_point_only() -> None:
    other = torch.ones(2)
    with pytest.raises(ValueError, match="one other point only"):
        Direction.of(gradient_at(POINT) + gradient_at(other))
    assert Direction.of(gradient_at(POINT) + gradient_at(POINT)).other_scale == 2.0
