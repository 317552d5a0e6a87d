"""FedAsync and centralised SGD: their twins, their special cases, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.optim import build
from fedsim.strategies.centralised import Centralised
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.tasks.models import mlp
from tests.build import Clocks, Play, local_sgd, play, quadratic, two_clients
from tests.reference import asynchronous as twin
from tests.strategies.tasks import images, noisy

TAU = (1.0, 0.83, 0.61, 0.37, 0.2)
TRUST: list[tuple[dict[str, Any], Callable[[int], float]]] = [
    ({"staleness": "constant"}, lambda k: 1.0),
    ({"staleness": "polynomial"}, lambda k: (k + 1) ** -0.5),
    ({"staleness": "polynomial", "a": 1.5}, lambda k: (k + 1) ** -1.5),
    ({"staleness": "hinge"}, lambda k: 1.0 if k <= 4 else 1 / (10 * (k - 4) + 1)),
    ({"staleness": "hinge", "a": 2.0, "b": 1}, lambda k: 1.0 if k <= 1 else 1 / (2 * (k - 1) + 1)),
]


@pytest.mark.parametrize("given, trust", TRUST, ids=["constant", "root", "power", "hinge", "soft hinge"])
def test_fedasync_equals_its_event_loop(given: dict[str, Any], trust: Callable[[int], float]) -> None:
    task, clients = noisy(steps=3)
    game = Play.start(task, FedAsync(alpha=0.7, local=local_sgd(task, 0.05, steps=3), **given), devices=Clocks(TAU))
    expected = twin.fedasync(clients, task.x0, 40, tau=twin.constant(TAU), alpha=0.7, trust=trust, eta=0.05)
    assert_close(game.path(40), expected.path(), rtol=0, atol=1e-12)
    assert game.fleet.now == expected.time[-1]
    assert max(max(late) for late in expected.staleness) > 4, "the hinge has bent"


def test_equal_clocks_make_every_model_equally_stale() -> None:
    task, _ = noisy(steps=3)
    game = Play.start(task, FedAsync(local=local_sgd(task, 0.01, steps=3)), devices=Clocks((1.0,) * 5))
    staleness = []
    for _ in range(15):
        game.step()
        staleness.append(game.seen.get("staleness_mean", 0.0))
    assert staleness[:5] == [0, 1, 2, 3, 4] and set(staleness[5:]) == {4}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"alpha": 0.0}, "alpha is the weight"),
        ({"alpha": 1.1}, "alpha is the weight"),
        ({"a": -1.0}, "a and b shape"),
        ({"a": float("inf"), "staleness": "hinge"}, "a and b shape"),  # inf times zero stale steps is no number
    ],
)
def test_weights_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedAsync(local=local_sgd(two_clients()), **given)


# Centralised SGD -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [8, 200])
def test_centralised_is_fedavg_with_one_step_of_everybody(hidden: int) -> None:
    task, _ = images(lambda shape, k: mlp(shape, k, hidden=(hidden,)), [7, 20, 1, 13], 5)
    ours = play(task, Centralised(local=local_sgd(task, 0.1, epochs=3, steps=None, batch_size=5)), 5)
    theirs = play(task, FedAvg(local=local_sgd(task, 0.1, steps=1, batch_size=5)), 5)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_centralised_on_whole_data_is_gradient_descent_on_their_union() -> None:
    task, clients = images(mlp, [7, 20, 1, 13], None)
    found = play(task, Centralised(local=local_sgd(task, 0.2)), 4)
    inputs, targets, x = torch.cat(clients.inputs), torch.cat(clients.targets), task.x0
    for row in found:
        x = x - 0.2 * clients._autograd(x, inputs, targets)
        assert_close(row, x, rtol=1e-4, atol=2e-6)


def test_a_rule_at_the_server_of_centralised_is_that_rule_on_one_machine() -> None:
    task = quadratic([1, 3], [0, 1], 2)
    rule = build({"name": "adam", "lr": 0.1}, task.layout)
    x = play(task, Centralised(server_optimizer=rule, local=local_sgd(task, 1.0)), 30)
    y, path = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64)), []
    theirs = torch.optim.Adam([y], lr=0.1)
    for _ in range(30):
        y.grad = 2 * y.detach() - 1.5
        theirs.step()
        path.append(y.detach().clone())
    assert_close(x, torch.stack(path), rtol=0, atol=1e-12)


def test_a_schedule_counts_the_rounds_of_centralised() -> None:
    rule = {"name": "sgd", "lr": 0.1, "schedule": {"name": "exponential", "gamma": 0.5}}
    x, expected = 2.0, []
    for r in range(4):
        x -= 0.1 * 0.5**r * (2 * x - 1.5)
        expected.append(x)
    found = play(two_clients(), Centralised(local=local_sgd(two_clients(), optimizer=rule)), 4)[:, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("ignore:.*is not batched")
@pytest.mark.parametrize(
    "strategy, change, message",
    [
        ("centralised", {"strategy": {"cohort_size": 2}}, "one machine has all data"),
        ("centralised", {"local": {"optimizer": {"name": "adam", "lr": 0.1}}}, "takes its own step"),
        ("fedasync", {"strategy": {"cohort_size": 2}}, "every client with data is at work at all times"),
        ("fedasync", {"uplink": {"compressor": "natural"}}, "clients send models, and entries"),
        ("stem", {"strategy": {"cohort_size": 2}}, "every client takes part"),
        ("mime", {"local": {"optimizer": {"name": "torch.optim:Adam", "lr": 0.1}}}, "keeps its own"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(strategy: str, change: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {
        "task": {"name": "quadratic", "a": [1, 3], "b": [0, 1], "x0": 2},
        "strategy": {"name": strategy},
        "local": {"steps": 2, "optimizer": {"name": "sgd", "lr": 0.1}},
    }
    with pytest.raises(ConfigError, match=message):
        compose({**raw, **{k: {**raw.get(k, {}), **v} for k, v in change.items()}}, "config")
