"""FedAvg-M-VR: its twin (one minibatch at two points), beta = 1 as FedAvg, and its fixed point."""

from __future__ import annotations

import pytest
import torch

from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.tasks.models import mlp
from tests.build import Play, local_sgd, play, quadratic, two_clients
from tests.reference.momentum import fedavg_m
from tests.strategies.tasks import images, noisy


@pytest.mark.parametrize("size", [None, 2])
def test_equals_its_twin_on_noisy_quadratics(size: int | None) -> None:
    task, twin = noisy(steps=3)
    strategy = FedAvgMVR(cohort_size=size, beta=0.3, gamma=0.1, local=local_sgd(task, 0.05, steps=3))
    expected = fedavg_m(twin, task.x0, 8, eta=0.05, beta=0.3, gamma=0.1, size=size, reduced=True)
    torch.testing.assert_close(play(task, strategy, 8), expected, rtol=0, atol=1e-12)


def test_equals_a_plain_loop_of_autograd() -> None:
    task, twin = images(mlp, [7, 20, 1, 13], 5, steps=4)
    strategy = FedAvgMVR(cohort_size=3, beta=0.4, local=local_sgd(task, 0.1, steps=4, batch_size=5))
    expected = fedavg_m(twin, task.x0, 4, eta=0.1, beta=0.4, gamma=0.4, size=3, reduced=True)
    torch.testing.assert_close(play(task, strategy, 4, width=2), expected, rtol=1e-4, atol=2e-5)


def test_beta_one_is_fedavg() -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    reduced = play(task, FedAvgMVR(cohort_size=2, beta=1.0, local=local), 10)
    torch.testing.assert_close(reduced, play(task, FedAvg(cohort_size=2, local=local), 10), rtol=0, atol=1e-12)


def test_two_clients_walk_as_worked_out() -> None:
    x = play(two_clients(), FedAvgMVR(beta=0.1, gamma=0.1, local=local_sgd(two_clients())), 3)[:, 0]
    assert x.tolist() == pytest.approx([1.98863, 1.97319, 1.95639], abs=6e-6)


def test_limit_is_that_of_fedavg_for_beta_does_not_shrink_the_bias() -> None:
    x = play(two_clients(), FedAvgMVR(beta=0.1, gamma=0.5, local=local_sgd(two_clients())), 450)
    assert float(x[-1]) == pytest.approx(0.598711, abs=1e-6)


def test_momentum_of_a_frozen_model_varies_as_an_exponential_average() -> None:
    beta, clients, steps, sigma = 0.1, 4, 5, 2.0
    task = quadratic(torch.ones(clients, 500), torch.zeros(clients, 500), torch.zeros(500), noise=sigma)
    play = Play.start(task, FedAvgMVR(beta=beta, gamma=0.0, local=local_sgd(task, 1e-9, steps=steps)))
    play.path(60)
    variance = float(play.path(120, lambda state: state.g).square().mean())
    assert variance == pytest.approx(beta / (2 - beta) * sigma**2 / (clients * steps), rel=0.06)
