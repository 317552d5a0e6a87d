"""FedAvg: a loop of autograd, its closed-form limit on quadratics, its weights and its server step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.aggregate import Mean
from fedsim.aggregate.coordinatewise import Median
from fedsim.aggregate.prepare import NNM, Clipping
from fedsim.optim import build
from fedsim.strategies.fedavg import FedAvg
from fedsim.tasks.models import cnn, mlp
from tests.build import digits_task, local_sgd, play, quadratic, two_clients
from tests.reference.fedavg import fedavg
from tests.strategies.tasks import images, noisy


@pytest.mark.parametrize(
    "model, schedule",
    [
        (mlp, {"epochs": 2, "batch_size": 5}),
        (mlp, {"epochs": None, "steps": 4, "batch_size": 8}),
        (cnn, {"epochs": 1, "batch_size": 6}),
    ],
)
@pytest.mark.parametrize("size", [None, 3])
def test_equals_a_plain_loop_of_autograd(model: Any, schedule: dict[str, Any], size: int | None) -> None:
    counts = [7, 20, 1, 0, 13, 9]
    given: dict[str, Any] = {"epochs": schedule["epochs"] or 1, "steps": schedule.get("steps")}
    task, twin = images(model, counts, schedule["batch_size"], **given)
    strategy = FedAvg(cohort_size=size, local=local_sgd(task, 0.2, **{"steps": None, **schedule}))
    rounds = 2 if model is cnn else 4
    expected = fedavg(twin, task.x0, rounds, eta=0.2, size=size)
    torch.testing.assert_close(play(task, strategy, rounds, width=4), expected, rtol=1e-4, atol=2e-5)
    assert (expected[-1] - task.x0).abs().max() > 1e-2


def test_limit_with_many_local_steps_is_the_closed_form_and_not_the_optimum() -> None:
    task, eta, steps = noisy(steps=1)[0], 0.1, 5
    task.noise = 0.0
    eye = torch.eye(3, dtype=torch.float64)
    w = eye - torch.linalg.matrix_power(eye - eta * task.a, steps)
    limit = torch.linalg.solve(w.sum(0), torch.einsum("nij,nj->i", w, task.b))
    x = play(task, FedAvg(local=local_sgd(task, eta, steps=steps)), 150)[-1]
    torch.testing.assert_close(x, limit, rtol=0, atol=1e-10)
    assert torch.linalg.vector_norm(limit - task.solution()) > 0.01


def test_one_local_step_with_all_clients_is_gradient_descent() -> None:
    task, eta = two_clients(), 0.3
    x, expected = torch.tensor(2.0, dtype=torch.float64), []
    for _ in range(6):
        x = x - eta * ((x - 0) + 3 * (x - 1)) / 2
        expected.append(float(x))
    assert play(task, FedAvg(local=local_sgd(task, eta, steps=1)), 6)[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("eta, stable", [(0.99, True), (1.01, False)])
def test_one_local_step_is_stable_up_to_twice_the_inverse_mean_curvature(eta: float, stable: bool) -> None:
    task = two_clients()  # mean curvature 2, so the bound is 1
    away = (play(task, FedAvg(local=local_sgd(task, eta, steps=1)), 100)[:, 0] - 0.75).abs()
    assert bool(away[-1] < away[0]) is stable


def test_clients_count_by_their_samples_unless_told_otherwise() -> None:
    task = quadratic([1, 1], [0, 1], 0, num_examples=[1, 3])
    local = local_sgd(task, 1.0, steps=1)  # one step of rate 1 lands on the client's own minimiser
    assert play(task, FedAvg(local=local), 1).item() == pytest.approx(0.75)
    assert play(task, FedAvg(local=local, aggregator=Mean(weights="uniform")), 1).item() == pytest.approx(0.5)


def test_a_robust_aggregator_sees_the_replies_apart() -> None:
    task = quadratic([1, 1, 1], [0, 1, 50], 0)
    local = local_sgd(task, 1.0, steps=1)
    assert play(task, FedAvg(local=local, aggregator=Median()), 1).item() == 1.0


@pytest.mark.parametrize(
    "first, rule, expected",
    [
        ((Clipping(norm=1.0),), Mean(), 2 / 3),  # 0, 1 and 50 become 0, 1 and 1
        ((NNM(f=1),), Median(), 0.5),  # pairs of neighbours: 0.5, 0.5 and 25.5
        ((Clipping(norm=1.0), NNM(f=1)), Median(), 1.0),  # 0, 1, 1 and then 0.5, 1, 1
        ((NNM(f=1), Clipping(norm=1.0)), Mean(), 2 / 3),  # 0.5, 0.5, 25.5 and then 0.5, 0.5, 1
        ((), Mean(), 17.0),
    ],
)
def test_pre_aggregators_prepare_the_updates_one_after_the_other(first: Any, rule: Any, expected: float) -> None:
    task = quadratic([1, 1, 1], [0, 1, 50], 0)
    strategy = FedAvg(local=local_sgd(task, 1.0, steps=1), pre_aggregators=first, aggregator=rule)
    assert play(task, strategy, 1).item() == pytest.approx(expected)


def test_server_momentum_is_heavy_ball_on_the_pseudo_gradient() -> None:
    task, local = two_clients(), local_sgd(two_clients(), steps=2)
    rule = build({"name": "sgd", "lr": 1.0, "momentum": 0.5}, task.layout)
    got = play(task, FedAvg(local=local, server_optimizer=rule), 4)[:, 0].tolist()
    x, v, expected = 2.0, 0.0, []
    for _ in range(4):
        delta = sum((x - b) * (1 - (1 - 0.1 * a) ** 2) for a, b in ((1, 0), (3, 1))) / 2
        v = 0.5 * v + delta
        x -= v
        expected.append(x)
    assert got == pytest.approx(expected, abs=1e-12)


def test_a_round_whose_clients_have_no_data_changes_nothing() -> None:
    task = digits_task(mlp, [0, 0, 0, 4])
    strategy = FedAvg(cohort_size=1, local=local_sgd(task, 0.1, epochs=1, steps=None, batch_size=4))
    path = torch.cat([task.x0[None], play(task, strategy, 8)])
    moved = (path[1:] != path[:-1]).any(1).tolist()
    assert True in moved and False in moved and bool(path.isfinite().all())


def test_a_cohort_larger_than_the_federation_is_refused() -> None:
    task = two_clients()
    with pytest.raises(ValueError, match="cohort_size=3 exceeds the 2 clients"):
        play(task, FedAvg(cohort_size=3, local=local_sgd(task)), 1)
