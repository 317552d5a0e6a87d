"""FedAvg-M and FedAvg-M-VR: beta = 1 as FedAvg, a fixed point, and the variance of momentum, MB-STORM's too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsim.optim import build
from fedsim.params import Layout
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.mb_storm import MBStorm
from tests.build import Play, local_sgd, play, quadratic, two_clients
from tests.strategies.tasks import noisy


@pytest.mark.parametrize("kind", [FedAvgM, FedAvgMVR])
@pytest.mark.parametrize("size", [None, 2])
def test_beta_one_is_fedavg(kind: Any, size: int | None) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    momentum = play(task, kind(cohort_size=size, beta=1.0, local=local), 10)
    torch.testing.assert_close(momentum, play(task, FedAvg(cohort_size=size, local=local), 10), rtol=0, atol=1e-12)


def test_fixed_point_is_that_of_fedavg_with_eta_times_beta() -> None:
    task = two_clients()
    short = play(task, FedAvg(local=local_sgd(task, 0.1 * 0.1)), 120)[-1]
    x = play(task, FedAvgM(beta=0.1, gamma=1.0, local=local_sgd(task, 0.1)), 150)[-1]
    torch.testing.assert_close(x, short, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [FedAvgM, FedAvgMVR, MBStorm])
def test_momentum_of_a_frozen_model_varies_as_an_exponential_average(kind: Any) -> None:
    # 500 coordinates are 500 repetitions; gamma = 0 freezes x, and a tiny eta keeps local models at x
    beta, clients, steps, sigma, eta = 0.1, 4, 5, 2.0, 1e-9
    task = quadratic(torch.ones(clients, 500), torch.zeros(clients, 500), torch.zeros(500), noise=sigma)
    play = Play.start(task, kind(beta=beta, gamma=0.0, local=local_sgd(task, eta, steps=steps)))
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
