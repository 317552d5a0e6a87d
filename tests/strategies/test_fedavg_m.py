"""FedAvg-M: its twin, beta = 1 as FedAvg, its fixed point, and the variance of its momentum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsim.optim import build
from fedsim.params import Layout
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.tasks.models import mlp
from tests.build import Play, local_sgd, play, quadratic, two_clients
from tests.reference.momentum import fedavg_m
from tests.strategies.tasks import images, noisy


@pytest.mark.parametrize("size", [None, 2])
def test_equals_its_twin_on_noisy_quadratics(size: int | None) -> None:
    task, twin = noisy(steps=3)
    strategy = FedAvgM(cohort_size=size, beta=0.3, gamma=0.1, local=local_sgd(task, 0.05, steps=3))
    expected = fedavg_m(twin, task.x0, 8, eta=0.05, beta=0.3, gamma=0.1, size=size)
    torch.testing.assert_close(play(task, strategy, 8), expected, rtol=0, atol=1e-12)


def test_equals_a_plain_loop_of_autograd() -> None:
    task, twin = images(mlp, [7, 20, 1, 13], 5, steps=4)
    strategy = FedAvgM(cohort_size=3, beta=0.4, local=local_sgd(task, 0.2, steps=4, batch_size=5))
    expected = fedavg_m(twin, task.x0, 4, eta=0.2, beta=0.4, gamma=0.8, size=3)
    torch.testing.assert_close(play(task, strategy, 4, width=2), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", [None, 2])
def test_beta_one_is_fedavg(size: int | None) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    momentum = play(task, FedAvgM(cohort_size=size, beta=1.0, local=local), 10)
    torch.testing.assert_close(momentum, play(task, FedAvg(cohort_size=size, local=local), 10), rtol=0, atol=1e-12)


def test_two_clients_walk_as_worked_out() -> None:
    x = play(two_clients(), FedAvgM(beta=0.1, gamma=1.0, local=local_sgd(two_clients())), 250)[:, 0]
    assert x[:3].tolist() == pytest.approx([1.77309, 1.39982, 0.972778], abs=5e-6)
    assert float(x[-1]) == pytest.approx(0.733055, abs=5e-7)


def test_fixed_point_is_that_of_fedavg_with_eta_times_beta() -> None:
    task = two_clients()
    short = play(task, FedAvg(local=local_sgd(task, 0.1 * 0.1)), 120)[-1]
    x = play(task, FedAvgM(beta=0.1, gamma=1.0, local=local_sgd(task, 0.1)), 150)[-1]
    torch.testing.assert_close(x, short, rtol=0, atol=1e-6)


def test_momentum_of_a_frozen_model_varies_as_an_exponential_average() -> None:
    # 500 coordinates are 500 repetitions; gamma = 0 freezes x, and a tiny eta keeps local models at x
    beta, clients, steps, sigma, eta = 0.1, 4, 5, 2.0, 1e-9
    task = quadratic(torch.ones(clients, 500), torch.zeros(clients, 500), torch.zeros(500), noise=sigma)
    play = Play.start(task, FedAvgM(beta=beta, gamma=0.0, local=local_sgd(task, eta, steps=steps)))
    play.path(60)  # (1 - beta)^60 of the start is left
    g = play.path(120, lambda state: state.g)
    variance = float(g.square().mean())
    assert variance == pytest.approx(beta / (2 - beta) * sigma**2 / (clients * steps), rel=0.06)


def test_default_gamma_moves_as_far_as_fedavg_would() -> None:
    task = two_clients()
    given = play(task, FedAvgM(beta=0.3, gamma=0.5 * 0.1 * 10, local=local_sgd(task)), 5)
    default = play(task, FedAvgM(beta=0.3, server_lr=0.5, local=local_sgd(task)), 5)
    torch.testing.assert_close(given, default, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "bad", [{"beta": 0.0}, {"beta": 1.5}, {"gamma": -1.0}, {"gamma": float("inf")}, {"cohort_size": 0}]
)
def test_hyper_parameters_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FedAvgM(local=local_sgd(two_clients()), **bad)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        {"name": "sgd", "lr": 0.1, "clip": {"global": 1.0}},
        {"name": "sgd", "lr": 0.1, "weight_decay": 0.1},
        {"name": "adam", "lr": 0.1},
        {"name": "sgd", "lr": 0.1, "schedule": {"name": "step"}},
    ],
)
def test_a_local_rule_that_would_act_on_the_momentum_too_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="local.optimizer|schedule"):
        FedAvgM(local=replace(local_sgd(two_clients()), optimizer=build(rule, Layout.of({"w": (2, 2)}))))
