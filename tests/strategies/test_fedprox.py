"""FedProx: mu = 0 as FedAvg, and the limits of exact local solutions."""

from __future__ import annotations

import pytest
import torch

from fedsim.aggregate import Mean
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedprox import FedProx
from fedsim.tasks.models import mlp
from tests.build import local_sgd, play, quadratic, two_clients
from tests.strategies.tasks import images, noisy


@pytest.mark.parametrize("size", [None, 2])
def test_without_a_pull_it_is_fedavg(size: int | None) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    assert torch.equal(
        play(task, FedProx(cohort_size=size, mu=0.0, local=local), 6),
        play(task, FedAvg(cohort_size=size, local=local), 6),
    )
    task, _ = images(mlp, [7, 20, 1, 13], 5)
    local = local_sgd(task, 0.1, epochs=1, steps=None, batch_size=5)
    assert torch.equal(play(task, FedProx(mu=0.0, local=local), 2), play(task, FedAvg(local=local), 2))


def _limit(mu: float) -> float:
    """Where two clients end that solve their local problems: 25 steps of 1 / (2 + mu) leave 1e-11 of the error."""
    at_zero, at_one = (
        float(play(task, FedProx(mu=mu, local=local_sgd(task, 1 / (2 + mu), steps=25)), 1))
        for task in (quadratic([1, 3], [0, 1], 0), quadratic([1, 3], [0, 1], 1))
    )
    return at_zero / (1 - (at_one - at_zero))  # a round is affine in x


def test_two_clients_walk_to_the_limit_of_exact_local_solutions() -> None:
    x = play(two_clients(), FedProx(mu=1.0, local=local_sgd(two_clients(), 1 / 3, steps=25)), 40)
    assert float(x[-1]) == pytest.approx(0.6, abs=1e-9)


@pytest.mark.parametrize("mu", [1.0, 0.25, 4.0, 40.0])
def test_limit_of_exact_local_solutions_is_a_weighted_mean_of_the_optima(mu: float) -> None:
    a, b = (1.0, 3.0), (0.0, 1.0)
    w = [i / (i + mu) for i in a]
    expected = sum(i * j for i, j in zip(w, b, strict=True)) / sum(w)
    assert mu != 1.0 or expected == pytest.approx(0.6)
    assert _limit(mu) == pytest.approx(expected, abs=1e-8)


def test_a_strong_pull_takes_the_limit_to_the_optimum() -> None:
    away = [0.75 - _limit(mu) for mu in (1.0, 10.0, 100.0, 1000.0)]
    assert away[0] > 4 * away[1] > 32 * away[2] > 300 * away[3] > 0


def test_one_exact_local_solution_is_the_proximal_point() -> None:
    task = quadratic([2.0], [1.0], 5.0)
    x = play(task, FedProx(mu=3.0, local=local_sgd(task, 0.2, steps=1)), 1)  # 0.2 * (2 + 3) = 1: one step solves
    assert float(x) == pytest.approx((2 * 1 + 3 * 5) / 5, abs=1e-12)


def test_clients_may_count_alike() -> None:
    task = quadratic([1.0, 3.0], [0.0, 1.0], 2.0, num_examples=[1, 9])
    local = local_sgd(task, 1 / 3, steps=25)
    uniform = FedProx(mu=1.0, aggregator=Mean(weights="uniform"), local=local)
    assert float(play(task, uniform, 30)[-1]) == pytest.approx(0.6, abs=1e-9)
    assert float(play(task, FedProx(mu=1.0, local=local), 30)[-1]) == pytest.approx(6.75 / 7.25, abs=1e-9)
