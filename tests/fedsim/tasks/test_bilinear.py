"""Bilinear saddle points: the operator, the solution, and the spectrum."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.tasks.bilinear import BilinearTask
from tests.build import formula_batch, saddle

POOL: Any = ThreadPoolExecutor(1)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_the_operator_is_the_gradient_in_x_and_its_opposite_in_y(lam: float) -> None:
    task = saddle(4, 3, lam=lam)
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    f, value = task.field(z, formula_batch([3, 1]))
    (g,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(f, torch.cat([g[:, :3], -g[:, 3:]], dim=1))


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_the_mean_operator_vanishes_at_the_solution(lam: float) -> None:
    task = saddle(7, 5, lam=lam)
    f, _ = task.field(task.solution().expand(7, -1), formula_batch(list(range(7))))
    assert float(f.mean(0).abs().max()) < 1e-12
    assert task.evaluate(task.solution(), POOL)["distance"] == pytest.approx(0.0, abs=1e-12)
    assert task.evaluate(torch.zeros(10), POOL)["distance"] == pytest.approx(float(task.solution().norm()))


def test_one_dimension_worked_out_by_hand() -> None:
    # f = 2xy + 3x - y: x = 1/2, y = -3/2
    one = torch.ones(1, 1)
    task = BilinearTask(2 * one[None], 3 * one, -one)
    assert task.solution().tolist() == [0.5, -1.5]
    f, value = task.field(torch.tensor([[1.0, 1.0]]), formula_batch([0]))
    assert f.tolist() == [[5.0, -1.0]] and value.tolist() == [4.0]


def test_a_regularised_operator_is_strongly_monotone_with_its_lam() -> None:
    task = saddle(3, 4, lam=0.5)
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    gap = task.field(a, formula_batch([0, 1, 2]))[0] - task.field(b, formula_batch([0, 1, 2]))[0]
    torch.testing.assert_close((gap * (a - b)).sum(1), 0.5 * (a - b).square().sum(1))


def test_drawn_matrices_are_symmetric_with_the_spectrum_asked_for() -> None:
    task = BilinearTask.drawn(5, 6, 0, low=0.5, high=2.0)
    torch.testing.assert_close(task.matrix, task.matrix.mT)
    spectrum = torch.linalg.eigvalsh(task.matrix.double())
    torch.testing.assert_close(spectrum, torch.linspace(0.5, 2, 6).double().expand(5, -1), rtol=1e-5, atol=1e-5)
    mean = torch.linalg.eigvalsh(task.matrix.double().mean(0))
    assert 0.5 <= float(mean.min()) and float(mean.max()) <= 2.0


def test_a_drawn_task_follows_its_seed() -> None:
    one, same, other = (BilinearTask.drawn(3, 4, seed) for seed in (0, 0, 1))
    assert torch.equal(one.matrix, same.matrix) and torch.equal(one.a, same.a)
    assert not torch.equal(one.matrix, other.matrix)


def test_noise_is_keyed_and_of_the_size_asked_for() -> None:
    quiet = saddle(2, 500)
    task = BilinearTask(quiet.matrix, quiet.a, quiet.b, noise=0.3)
    z = torch.zeros(2, 1000, dtype=torch.float64)
    noise: Tensor = task.field(z, formula_batch([0, 1]))[0] - quiet.field(z, formula_batch([0, 1]))[0]
    assert torch.equal(noise, task.field(z, formula_batch([0, 1]))[0] - quiet.field(z, formula_batch([0, 1]))[0])
    assert float(noise.std()) == pytest.approx(0.3, rel=0.08)
    assert not torch.equal(
        noise, task.field(z, formula_batch([0, 1], job=1))[0] - quiet.field(z, formula_batch([0, 1]))[0]
    )


def test_constants_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        BilinearTask(torch.ones(2, 3, 3), torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="do not fit"):
        BilinearTask(torch.ones(2, 3, 2), torch.ones(2, 3), torch.ones(2, 3))
