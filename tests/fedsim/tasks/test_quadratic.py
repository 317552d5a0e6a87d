"""Quadratic clients: gradient, solution, noise, and what does not fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.clients.oracle import full_gradient, full_loss
from fedsim.strategies.fedavg import FedAvg
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Play, cohort, drawn, formula_batch, local_sgd, quadratic

POOL: Any = ThreadPoolExecutor(1)


def _curvatures(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(2)
    return {"numbers": matrix[:, 0, 0], "diagonals": matrix.diagonal(dim1=1, dim2=2), "matrices": matrix}[kind]


@pytest.mark.parametrize("kind", ["numbers", "diagonals", "matrices"])
def test_the_field_is_the_gradient_of_the_loss_that_autograd_finds(kind: str) -> None:
    b = torch.tensor([[1.0, 2], [0, -1], [3, 0]], dtype=torch.float64)
    task = quadratic(_curvatures(kind), b, [0, 0])
    x = torch.tensor([[1.0, 1], [2, -1]], dtype=torch.float64, requires_grad=True)
    g, loss = task.field(x, formula_batch([2, 0]))
    (expected,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(g, expected)
    whole = torch.diag_embed(task.a) if task.a.ndim == 2 else task.a
    away = x.detach() - b[[2, 0]]
    torch.testing.assert_close(loss.detach(), 0.5 * torch.einsum("ci,cij,cj->c", away, whole[[2, 0]], away))


@pytest.mark.parametrize("kind", ["numbers", "diagonals", "matrices"])
def test_the_solution_is_where_the_weighted_gradients_cancel(kind: str) -> None:
    b = torch.tensor([[1.0, 2], [0, -1], [3, 0]], dtype=torch.float64)
    task = quadratic(_curvatures(kind), b, [0, 0], num_examples=[1, 5, 2])
    g, _ = task.field(task.solution().expand(3, -1), formula_batch([0, 1, 2]))
    assert float((task.num_examples[:, None] * g).sum(0).abs().max()) < 1e-12


def test_two_numbers_have_the_solution_worked_out_by_hand() -> None:
    task = quadratic([1, 3], [0, 1], 2)
    assert task.solution().tolist() == [0.75]
    # at 2: losses 1/2 * 4 and 3/2 * 1
    assert task.evaluate(torch.tensor([2.0]), POOL) == {"test_loss": (2 + 1.5) / 2, "distance": 1.25}
    assert task.evaluate_clients(torch.tensor([2.0]), POOL)["loss"].tolist() == [2.0, 1.5]


def test_noise_is_keyed_by_client_job_and_step_and_averages_out() -> None:
    task = quadratic(torch.ones(2, 4000), torch.zeros(2, 4000), torch.zeros(4000), noise=0.5)
    x = torch.zeros(2, 4000, dtype=torch.float64)
    first, _ = task.field(x, formula_batch([0, 1]))
    assert torch.equal(first, task.field(x, formula_batch([0, 1]))[0])
    assert torch.equal(first[1], task.field(x[:1], formula_batch([1]))[0][0])
    for other in (formula_batch([0, 1], job=1), formula_batch([0, 1], step=1)):
        assert not torch.equal(first, task.field(x, other)[0])
    assert float(first.std()) == pytest.approx(0.5, rel=0.05)
    assert float(first.mean()) == pytest.approx(0.0, abs=4 * 0.5 / 8000**0.5)


def test_a_session_writes_where_it_is_told() -> None:
    task, out = drawn(3, 2), torch.empty(2, 2, dtype=torch.float64)
    x = torch.zeros(2, 2).double()
    g, _ = task.session(x).gradient(formula_batch([0, 2]), out)
    assert g.data_ptr() == out.data_ptr() and torch.equal(out, task.field(x, formula_batch([0, 2]))[0])


def test_a_drawn_task_follows_its_seed_within_its_bounds() -> None:
    one, same, other = (QuadraticTask.drawn(50, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.a, same.a) and torch.equal(one.b, same.b) and not torch.equal(one.a, other.a)
    assert 0.5 <= float(one.a.min()) and float(one.a.max()) <= 2.0
    assert float(QuadraticTask.drawn(50, 3, 0, spread=0.0).b.abs().max()) == 0.0


def test_the_start_is_not_shared_with_the_task() -> None:
    task = quadratic([1], [0], 2)
    task.init(0).add_(1)
    assert task.x0.tolist() == [2.0]


def test_epochs_are_steps_and_the_batch_size_changes_nothing() -> None:
    task = drawn(3, 2)
    paths = [
        Play.start(task, FedAvg(local=local_sgd(task, **schedule))).path(3)
        for schedule in (
            {"steps": 4, "batch_size": None},
            {"steps": 4, "batch_size": 7},
            {"steps": None, "epochs": 4},
        )
    ]
    assert torch.equal(paths[0], paths[1]) and torch.equal(paths[0], paths[2])


def test_clients_of_several_examples_take_as_many_steps_as_the_schedule_counts() -> None:
    """Each towards its minimiser at 8 by a half: so many steps leave 8 / 2^steps."""
    num_examples, schedule = [600, 5, 2, 0], {"steps": None, "epochs": 2, "batch_size": 300}
    task = quadratic([1.0] * 4, [8.0] * 4, 0.0, num_examples=num_examples)
    clients, local = cohort(task, [0, 1, 2, 3]), local_sgd(task, lr=0.5, **schedule)
    run = local(clients, torch.zeros(1, dtype=torch.float64))
    steps = local.schedule.num_steps(task.num_examples)
    assert steps.tolist() == [4, 2, 2, 0] == run.steps.tolist()
    assert (-run.delta.dense()[:, 0]).tolist() == [8 - 8 / 2**k for k in steps.tolist()]
    assert full_loss(clients, torch.zeros(1, dtype=torch.float64)).tolist() == [32.0, 32.0, 32.0, 0.0]
    assert full_gradient(clients, torch.zeros(1, dtype=torch.float64))[:, 0].tolist() == [-8.0, -8.0, -8.0, 0.0]


def test_a_client_without_examples_takes_no_step() -> None:
    task = quadratic([1, 1, 1], [4, 9, 1], 0, num_examples=[0, 3, 1])
    start, clients = torch.zeros(1, dtype=torch.float64), cohort(task, [1, 2, 0])
    run = local_sgd(task, lr=0.5, steps=1)(clients, start)
    # half of the way to its minimiser for each that has data
    assert run.steps.tolist() == [1, 1, 0] and run.delta.dense()[:, 0].tolist() == [-4.5, -0.5, 0]
    assert full_gradient(clients, start)[:, 0].tolist() == [-9, -1, 0]
    loss = task.evaluate_clients(start, POOL)["loss"]
    assert torch.isnan(loss[0]) and loss[1:].tolist() == [40.5, 0.5]
    assert task.evaluate(start, POOL)["test_loss"] == (3 * 40.5 + 0.5) / 4


@pytest.mark.parametrize(
    "a, b, x0",
    [
        ([1, 2], [0], [0]),
        ([1, 2], [0, 1], [0, 0]),
        ([[1, 2, 3]], [[0, 1]], [0, 0]),
        ([1], [[0, 1]], [0]),
    ],
)
def test_constants_that_do_not_fit_are_refused(a: Any, b: Any, x0: Any) -> None:
    with pytest.raises(ValueError, match="do not fit: give one entry per client"):
        QuadraticTask(torch.tensor(a).float(), torch.tensor(b).float(), torch.tensor(x0).float())


def test_constants_of_diagonals_are_those_of_their_matrices_and_take_no_matrix() -> None:
    diagonals = torch.tensor([[1.0, 3.0, -2.0], [2.0, 0.5, 4.0]])
    b, x0 = torch.zeros(2, 3), torch.zeros(3)
    one, other = (QuadraticTask(a, b, x0).constants for a in (diagonals, torch.diag_embed(diagonals)))
    assert one.each.tolist() == [3.0, 4.0]
    assert (one.of_mean, one.mu) == (1.75, 1.0) == pytest.approx((other.of_mean, other.mu))
    assert torch.equal(one.each, other.each)
    many = 200_000  # as a matrix, 320 GB
    assert QuadraticTask(torch.ones(1, many), torch.zeros(1, many), torch.zeros(many)).constants.mu == 1.0
