"""Robust logistic regression: its operator by autograd, its solution by scipy, and VR-MASHA1 on its samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fedsim.compose import compose
from fedsim.compress.sparsify import RandK
from fedsim.config import ConfigError
from fedsim.strategies.extragradient import Extragradient
from fedsim.strategies.masha1 import Masha1
from fedsim.task import Schedule
from fedsim.tasks.robust import RobustLogisticTask
from tests.build import Play, streams


def _task(epsilon: float | None = 0.3, clients: int = 3, samples: int = 8, dim: int = 2) -> RobustLogisticTask:
    task = RobustLogisticTask.drawn(clients, dim, samples, 0, epsilon=epsilon, rho=1.0, lam=0.3, spread=0.5)
    return RobustLogisticTask(task.inputs.double(), task.labels.double(), epsilon, 1.0, 0.3)


def _value(task: RobustLogisticTask, w: Tensor, r: Tensor, client: int | slice = slice(None)) -> Tensor:
    """f, as the module's head writes it."""
    x, y = task.inputs[client].reshape(-1, len(w)), task.labels[client].flatten()
    losses = torch.log(1 + torch.exp(-y * ((x + r) @ w)))
    return losses.mean() + task.lam / 2 * w.dot(w) - task.rho * r.dot(r)


def test_the_operator_is_down_in_w_and_up_in_r() -> None:
    task, ids = _task(), torch.tensor([2, 0, 1])
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f, values = task.field(z, task.batches(ids, streams(ids), Schedule(batch_size=None))[0])
    for row, client in enumerate(ids.tolist()):
        w, r = (half.clone().requires_grad_() for half in z[row].chunk(2))
        value = _value(task, w, r, client)
        down, up = torch.autograd.grad(value, (w, r))
        torch.testing.assert_close(f[row], torch.cat([down, -up]), rtol=0, atol=1e-7)  # shares are float32
        assert float(values[row]) == pytest.approx(float(value.detach()), abs=1e-7)


@pytest.mark.parametrize("epsilon", [0.02, None])  # a bound that holds r back, and none
def test_the_solution_is_that_of_scipy(epsilon: float | None) -> None:
    task = _task(epsilon)
    ball = [] if epsilon is None else [{"type": "ineq", "fun": lambda r: epsilon**2 - r @ r}]

    def worst(w: np.ndarray) -> np.ndarray:
        cost = lambda r: -float(_value(task, torch.from_numpy(w), torch.from_numpy(r)))  # noqa: E731
        return minimize(cost, np.zeros(2), constraints=ball, method="SLSQP", options={"ftol": 1e-14}).x

    def outer(w: np.ndarray) -> float:
        return float(_value(task, torch.from_numpy(w), torch.from_numpy(worst(w))))

    w = minimize(outer, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x
    expected = np.concatenate([w, worst(w)])
    np.testing.assert_allclose(task.solution().numpy(), expected, rtol=0, atol=2e-4)
    assert (abs(np.linalg.norm(expected[2:]) - (epsilon or 0)) < 1e-4) == (epsilon is not None)


def test_minibatches_of_masha1_lead_where_whole_operators_do() -> None:
    task = _task()
    zero = torch.zeros(4, dtype=torch.float64)
    for strategy, rounds in (
        (Extragradient(lr=0.5, prox=task.prox), 80),
        (Masha1(lr=0.15, p=0.3, batch_size=2, cohort_size=2, compressor=RandK(k=2), prox=task.prox), 250),
    ):
        x = Play.start(task, strategy, x0=zero).path(rounds)[-1]
        assert task.evaluate(x, None)["distance"] < 2e-3, strategy  # type: ignore[arg-type]


def test_accuracy_under_attack_is_that_of_the_worst_perturbation() -> None:
    # on a line, y x = 1, 3 and -2, and w > 0: a perturbation of 2 turns the first over
    inputs, labels = torch.tensor([[[1.0], [-3.0], [2.0]]]), torch.tensor([[1.0, -1.0, -1.0]])
    task = RobustLogisticTask(inputs, labels, 2.0, 5.0, 0.5)
    assert task.evaluate(torch.tensor([1.0, 0.0]), None)["robust_accuracy"] == pytest.approx(1 / 3)  # type: ignore[arg-type]


def test_a_file_of_it_runs_and_bad_sizes_are_refused() -> None:
    raw = {"task": "robust_logistic", "clients": {"count": 3}, "strategy": {"name": "masha1", "lr": 0.1}}
    compose(raw, "x.yaml").close()
    with pytest.raises(ConfigError, match="task: needs .* rho > 0"):
        compose({**raw, "task": {"name": "robust_logistic", "rho": 0.0}}, "x.yaml")
