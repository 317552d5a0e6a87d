"""FedNova: its twin for plain SGD, local momentum and a pull; equal steps as FedAvg; unequal ones without a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.aggregate import CenteredClipping, Mean, Median
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fednova import FedNova
from fedsim.strategies.fedprox import FedProx
from fedsim.streams import Streams
from fedsim.task import Schedule
from fedsim.tasks.formula import FormulaBatch
from fedsim.tasks.models import mlp, resnet_bn
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Play, local_sgd, play, two_clients
from tests.reference.clients import Formulas
from tests.reference.drift import fednova
from tests.strategies.tasks import images, noisy

WAYS: dict[str, dict[str, Any]] = {"plain": {}, "momentum": {"momentum": 0.8}, "pull": {"mu": 0.6}}


class UnevenTask(QuadraticTask):
    """Clients take as many local steps as they have samples, each along their whole function."""

    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> Any:
        return UnevenBatches(self.num_examples[ids], streams)


@dataclass
class UnevenBatches:
    """Their steps; clients with more of them come first."""

    num_steps: Tensor
    streams: Streams

    def __len__(self) -> int:
        return int(self.num_steps.max())

    def active(self, step: int) -> int:
        return int((self.num_steps > step).sum())

    def __getitem__(self, step: int) -> FormulaBatch:
        streams = self.streams.rows(slice(self.active(step)))
        return FormulaBatch(streams.clients, streams, step)


class Uneven(Formulas):
    """Their twin."""

    def __init__(self, task: QuadraticTask) -> None:
        super().__init__(task.a, task.b, 0, task.noise)
        self.counts = task.num_examples.tolist()

    def samples(self, i: int) -> int:
        return self.counts[i]

    def steps(self, i: int) -> int:
        return self.counts[i]


def uneven(counts: list[int], noise: float = 0.3) -> tuple[QuadraticTask, Uneven]:
    """Noisy quadratics of clients with these numbers of steps, and their twin."""
    even, _ = noisy(steps=1, clients=len(counts))
    task = UnevenTask(even.a, even.b, even.x0, noise, torch.tensor(counts))
    return task, Uneven(task)


def two(x0: float) -> QuadraticTask:
    """f_1 = x^2 / 2 with one step and f_2 = 3/2 (x - 1)^2 with ten."""
    a, b, x = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 3.0], [0.0, 1.0], [x0]))
    return UnevenTask(a, b, x, 0.0, torch.tensor([1, 10]))


def make(task: Any, way: str, eta: float, aggregator: Any = None, size: int | None = None, **local: Any) -> FedNova:
    """FedNova in one of the three ways."""
    changes = WAYS[way]
    optimizer = {"name": "sgd", "lr": eta, "momentum": changes.get("momentum", 0.0)}
    return FedNova(
        cohort_size=size,
        mu=changes.get("mu", 0.0),
        aggregator=aggregator or Mean(),
        local=local_sgd(task, optimizer=optimizer, **local),
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [None, 3])
def test_equals_its_twin_where_clients_take_unequal_steps(way: str, size: int | None) -> None:
    task, twin = uneven([5, 1, 8, 0, 3])
    strategy = make(task, way, 0.05, size=size)
    expected = fednova(twin, task.x0, 8, eta=0.05, size=size, **WAYS[way])
    torch.testing.assert_close(play(task, strategy, 8, width=2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_equals_a_plain_loop_of_autograd(way: str) -> None:
    task, twin = images(mlp, [7, 20, 1, 13], 5, epochs=2)
    strategy = make(task, way, 0.1, size=3, epochs=2, steps=None, batch_size=5)
    expected = fednova(twin, task.x0, 3, eta=0.1, size=3, **WAYS[way])
    torch.testing.assert_close(play(task, strategy, 3, width=2), expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equal_steps_make_it_fedavg(size: int | None, momentum: float) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, steps=3, optimizer={"name": "sgd", "lr": 0.05, "momentum": momentum})
    expected = play(task, FedAvg(cohort_size=size, server_lr=0.7, local=local), 8)
    found = play(task, FedNova(cohort_size=size, server_lr=0.7, local=local), 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_equal_steps_with_a_pull_go_as_far_as_steps_without_it() -> None:
    # tau_eff is K and not the sum of powers a: FedProx's step times K / a
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    x = play(task, FedProx(mu=0.6, server_lr=3 / (1 + 0.97 + 0.97**2), local=local), 8)
    torch.testing.assert_close(play(task, FedNova(mu=0.6, local=local), 8), x, rtol=0, atol=1e-12)


def test_unequal_steps_bias_fedavg_and_not_fednova() -> None:
    # as eta falls FedAvg tends to 30 / 31, where each client counts K_i times, and FedNova to the optimum 3 / 4
    for kind, found, tends_to in ((FedAvg, 0.967318, 30 / 31), (FedNova, 0.747463, 0.75)):
        for eta, expected in ((1e-3, pytest.approx(found, abs=5e-7)), (1e-5, pytest.approx(tends_to, abs=3e-5))):
            images = []
            for x0 in (0.0, 1.0):
                task = two(x0)
                local = local_sgd(task, eta)
                images.append(float(play(task, kind(aggregator=Mean(weights="uniform"), local=local), 1)[-1]))
            at_zero, at_one = images  # a round is affine in x: its fixed point follows from two of its images
            assert at_zero / (1 - (at_one - at_zero)) == expected


@pytest.mark.parametrize("way", WAYS)
def test_small_steps_take_clients_that_work_unequally_to_the_optimum(way: str) -> None:
    task = two(0.75)
    strategy = make(task, way, 1e-6, Mean(weights="uniform"))
    moved = float(play(task, strategy, 1)[-1]) - 0.75
    assert abs(moved) < 1e-9, "the optimum is a fixed point up to the square of the rate"


def test_normalisers_as_worked_out() -> None:
    task = two_clients()
    assert make(task, "plain", 0.1).normaliser(4, 0.1) == 4
    assert make(task, "momentum", 0.1).normaliser(3, 0.1) == pytest.approx(1 + 1.8 + (1 + 0.8 * 1.8))
    assert make(task, "pull", 0.1).normaliser(3, 0.1) == pytest.approx(1 + 0.94 + 0.94**2)
    assert make(task, "pull", 0.1).normaliser(0, 0.1) == 0


def test_a_pull_is_divided_by_the_rate_of_its_round() -> None:
    task, twin = uneven([4, 1, 2], noise=0.0)
    schedule = {"name": "step", "every": 1, "gamma": 0.5}
    local = local_sgd(task, optimizer={"name": "sgd", "lr": 0.2, "schedule": schedule})
    play = Play.start(task, FedNova(mu=0.6, local=local))
    play.step()
    expected = fednova(twin, play.state.x, 1, eta=0.1, mu=0.6)
    torch.testing.assert_close(play.path(1), expected, rtol=0, atol=1e-12)


def test_a_robust_rule_judges_directions_and_lengths() -> None:
    task, twin = uneven([4, 1, 2], noise=0.0)
    x = play(task, make(task, "plain", 0.1, Median()), 1)[0]
    directions = []
    for i in range(3):
        y = task.x0.clone()
        for _ in range(twin.steps(i)):
            y = y - 0.1 * twin.full(i, y)
        directions.append((task.x0 - y) / twin.steps(i))
    expected = task.x0 - 2 * torch.stack(directions).median(0).values
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


def test_a_rule_that_cuts_lengths_cuts_no_counts() -> None:
    task, _ = noisy(steps=6)
    found = play(task, make(task, "plain", 0.01, CenteredClipping(tau=5.0), steps=6), 4)
    expected = play(task, make(task, "plain", 0.01, Mean(weights="uniform"), steps=6), 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_buffers_of_a_model_follow_the_mean_whatever_the_steps() -> None:
    task, _ = images(resnet_bn, [8, 4], 4)
    n, local = task.layout.num_trainable, {"epochs": 1, "steps": None, "batch_size": 4}
    found = play(task, make(task, "plain", 0.01, **local), 1)[0]
    expected = play(task, FedAvg(local=local_sgd(task, 0.01, **local)), 1)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found[n:], expected[n:])
    assert not torch.allclose(found[:n], expected[:n], rtol=0, atol=1e-6)


def test_a_pull_beside_local_momentum_is_refused() -> None:
    local = local_sgd(two_clients(), optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9})
    with pytest.raises(ValueError, match="mu=0.1 does not go with local momentum"):
        FedNova(mu=0.1, local=local)


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "adam"},
        {"name": "sgd", "momentum": 0.9, "nesterov": True},
        {"name": "sgd", "momentum": 0.9, "dampening": 0.5},
        {"name": "sgd", "momentum": 0.9, "ema": True},
        {"name": "sgd", "clip": {"global": 1.0}},
        {"name": "sgd", "momentum": 0.9, "state_scope": "client"},
        {"name": "sgd", "schedule": {"name": "step", "unit": "steps"}},
    ],
    ids=["adam", "nesterov", "dampening", "ema", "clip", "scope", "schedule"],
)
def test_a_local_rule_whose_reach_is_not_known_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"local\.optimizer|learning rate of a round"):
        FedNova(local=local_sgd(two_clients(), optimizer={"lr": 0.1, **rule}))
