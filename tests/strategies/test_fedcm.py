"""FedCM: its twin, FedAvg-M under another name, and a local rate that decays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedcm import FedCM
from fedsim.tasks.models import mlp
from tests.build import Play, local_sgd, play, two_clients
from tests.reference.drift import fedcm
from tests.strategies.tasks import images, noisy

DECAYING = {"name": "sgd", "lr": 0.05, "schedule": {"name": "exponential", "gamma": 0.8}}


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("optimizer, gamma", [(None, 1.0), (DECAYING, 0.8)])
def test_equals_its_twin_on_noisy_quadratics(size: int | None, optimizer: dict[str, Any] | None, gamma: float) -> None:
    task, twin = noisy(steps=3)
    strategy = FedCM(cohort_size=size, alpha=0.3, local=local_sgd(task, 0.05, steps=3, optimizer=optimizer))
    expected = fedcm(twin, task.x0, 8, eta=lambda r: 0.05 * gamma**r, alpha=0.3, size=size)
    torch.testing.assert_close(play(task, strategy, 8), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [None, 2])
def test_is_fedavg_m_at_parity(size: int | None) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    x = play(task, FedCM(cohort_size=size, alpha=0.2, server_lr=0.9, local=local), 8)
    same = play(task, FedAvgM(cohort_size=size, beta=0.2, server_lr=0.9, local=local), 8)
    given = play(task, FedAvgM(cohort_size=size, beta=0.2, gamma=0.9 * 0.05 * 3, local=local), 8)
    assert torch.equal(x, same)
    torch.testing.assert_close(x, given, rtol=0, atol=1e-12)
    task, _ = images(mlp, [7, 20, 1, 13], 5)
    local = local_sgd(task, 0.1, epochs=1, steps=None, batch_size=5)
    x, same = play(task, FedCM(alpha=0.2, local=local), 3), play(task, FedAvgM(beta=0.2, local=local), 3)
    assert torch.equal(x, same)


@pytest.mark.parametrize("size", [None, 2])
def test_alpha_one_is_fedavg(size: int | None) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, steps=3, optimizer=DECAYING)
    x = play(task, FedCM(cohort_size=size, alpha=1.0, local=local), 8)
    torch.testing.assert_close(x, play(task, FedAvg(cohort_size=size, local=local), 8), rtol=0, atol=1e-12)


def test_the_direction_sent_has_full_length_and_is_a_mean_gradient() -> None:
    task, twin = noisy(steps=1)
    task.noise = 0.0
    play = Play.start(task, FedCM(alpha=1.0, local=local_sgd(task, steps=1, optimizer=DECAYING)))
    for _ in range(3):
        x = play.state.x
        play.step()
        mean = torch.stack([twin.full(i, x) for i in range(5)]).mean(0)
        torch.testing.assert_close(play.state.d, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        {"name": "sgd", "lr": 0.1, "clip": {"global": 1.0}},
        {"name": "adam", "lr": 0.1},
        {"name": "sgd", "lr": 0.1, "schedule": {"name": "step", "unit": "steps"}},
        {"name": "sgd", "lr": [0.1, 0.2]},
    ],
    ids=["momentum", "clip", "adam", "steps", "rates"],
)
def test_a_local_rule_that_is_not_one_rate_a_round_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"local\.optimizer|learning rate of a round"):
        FedCM(local=local_sgd(two_clients(), optimizer=rule))
