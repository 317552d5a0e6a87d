"""Proxes: numbers worked out by hand, and that nothing near is better than what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.params import Layout
from fedsim.prox import FREE, L1, PROXES, Ball, Box, Each, Simplex, solve

GAMMA = 0.3


@pytest.mark.parametrize(
    "prox, z, expected",
    [
        (Ball(radius=5.0), [6.0, 8.0], [3.0, 4.0]),
        (Ball(radius=5.0), [1.0, -2.0], [1.0, -2.0]),
        (Ball(radius=5.0), [0.0, 0.0], [0.0, 0.0]),
        (Box(low=-1.0, high=2.0), [-3.0, 0.5, 7.0], [-1.0, 0.5, 2.0]),
        (Simplex(), [2.0, 0.0], [1.0, 0.0]),
        (Simplex(), [0.5, 0.2, 0.0], [0.6, 0.3, 0.1]),  # a tenth to each
        (Simplex(), [0.9, 0.5, -3.0], [0.7, 0.3, 0.0]),
        (L1(weight=2.0), [1.0, -0.5, -4.0], [0.4, 0.0, -3.4]),  # 0.3 * 2 off each
        (FREE, [1.0, -2.0], [1.0, -2.0]),
    ],
)
def test_as_worked_out(prox: Any, z: list[float], expected: list[float]) -> None:
    stack = torch.tensor([z, [2 * v for v in z]], dtype=torch.float64)
    assert prox(stack, GAMMA)[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(prox(stack, GAMMA)[0], prox(stack[0], GAMMA))


PENALTY: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "ball": (Ball(radius=0.8), lambda u: u * (0.8 / u.norm(dim=-1, keepdim=True)).clamp(max=1)),
    "box": (Box(low=-0.5, high=0.6), lambda u: u.clamp(-0.5, 0.6)),
    "simplex": (Simplex(), lambda u: u.abs() / u.abs().sum(-1, keepdim=True)),
    "l1": (L1(weight=0.7), lambda u: u),
}
"""{name: (the prox, a way to make any point one of the set)}."""


@pytest.mark.parametrize("name", PROXES)
def test_nothing_is_better_than_the_prox(name: str) -> None:
    (prox, allowed), draw = PENALTY[name], torch.Generator().manual_seed(0)
    z = torch.randn(5, 1, 4, generator=draw, dtype=torch.float64)
    best = prox(z, GAMMA)
    torch.testing.assert_close(allowed(best), best, rtol=0, atol=1e-12)
    near = best + 0.1 * torch.randn(5, 200, 4, generator=draw, dtype=torch.float64)
    others = allowed(torch.cat([near, torch.randn(5, 200, 4, generator=draw, dtype=torch.float64)], 1))

    def value(u: Tensor) -> Tensor:
        return (0.7 * u.abs().sum(-1) if name == "l1" else 0) + (u - z).square().sum(-1) / (2 * GAMMA)

    assert bool((value(others) >= value(best) - 1e-12).all())


def test_each_tensor_has_its_own_and_the_others_none() -> None:
    layout = Layout.of({"a": (2,), "b": (3,), "c": (1,)})
    z = torch.tensor([[3.0, 4.0, 9.0, 0.0, 0.0, 9.0]])
    found = Each(layout, {"a": Ball(radius=2.5), "b": Simplex()})(z, 1.0)
    assert found.tolist() == [[1.5, 2.0, 1.0, 0.0, 0.0, 9.0]]


def test_a_solution_that_is_not_found_is_said() -> None:
    with pytest.raises(ValueError, match="no solution found in 50 steps; is the problem monotone"):
        solve(lambda z: -z, torch.ones(2), FREE, 0.5, limit=50)


@pytest.mark.parametrize("kind, bad", [(Ball, {"radius": 0.0}), (Box, {"low": 1.0}), (L1, {"weight": -1.0})])
def test_bad_sizes_are_refused(kind: type, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        kind(**bad)
