"""Weights from observed arrivals: no clock is asked for, and they become what clocks would have given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.aggregate.coordinatewise import TrimmedMean
from fedsim.sim.devices import Exponential
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.clocks import Times
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedfix import FedFix
from tests.build import Clocks, Play, f_80, local_sgd, play, quadratic, rows_of
from tests.strategies.tasks import noisy

SCHEMES: list[tuple[Callable[..., Any], float]] = [
    (lambda **of: AsyncFedAvg(**of), 0.02),
    (lambda **of: FedFix(interval=0.5, **of), 1e-9),
    (lambda **of: FedFix(interval=0.2, **of), 1e-9),
    (lambda **of: FedBuff(buffer_size=2, **of), 0.04),
]
schemes = pytest.mark.parametrize("make, off", SCHEMES, ids=["async", "fedfix .5", "fedfix .2", "fedbuff"])
CLOSED = Times(torch.tensor(f_80(), dtype=torch.float64), torch.zeros(5, dtype=torch.float64))


def _weights(game: Play, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the last weight d_i of each client, the sum of all), after so many aggregations."""
    last, total = torch.zeros(2, 5, dtype=torch.float64)
    noted = type(game.strategy).noted

    def seen(self: Any, s: Any, r: Any) -> Any:
        after, d = noted(self, s, r)
        last[r.ids], total[r.ids] = d, total[r.ids] + d
        return after, d

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(game.strategy), "noted", seen)
        game.path(rounds)
    return last, total


@schemes
def test_they_become_what_the_clocks_give(make: Callable[..., Any], off: float) -> None:
    task, _ = noisy(steps=1)
    strategy = make(weights="observed", local=local_sgd(task, 1e-3, steps=1))
    last, total = _weights(Play.start(task, strategy, devices=Clocks(f_80())), 600)
    p = torch.full((5,), 0.2, dtype=torch.float64)
    expected = strategy.unbiased(p, CLOSED)
    assert last.tolist() == pytest.approx(expected.tolist(), rel=off)
    assert (total / 600).tolist() == pytest.approx([0.2] * 5, rel=0.06), "everybody moved the model by its importance"


def test_a_first_arrival_makes_up_for_what_its_client_missed() -> None:
    # windows of half a second, jobs of 1, .8, .6, .4, .2 seconds: whoever is in its n-th window weighs n p_i
    task, _ = noisy(steps=1)
    strategy = FedFix(interval=0.5, weights="observed", local=local_sgd(task, 1e-3, steps=1))
    game = Play.start(task, strategy, devices=Clocks(f_80()))
    first, total = _weights(game, 2)
    assert first.tolist() == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.2])
    assert total.tolist() == pytest.approx([0.4] * 5)
    assert game.state.arrivals.tolist() == [1, 1, 1, 2, 2]


def test_random_clocks_are_learned() -> None:
    task, _ = noisy(steps=1)
    strategy = FedFix(interval=0.5, weights="observed", local=local_sgd(task, 1e-3, steps=1))
    last, _ = _weights(Play.start(task, strategy, devices=Exponential(mean=1.0, x=80, count=5)), 1500)
    tau = torch.tensor(f_80(), dtype=torch.float64)
    expected = 0.2 / (1 - torch.exp(-0.5 / tau))
    assert last.tolist() == pytest.approx(expected.tolist(), rel=0.1)


def test_importances_by_samples_are_kept() -> None:
    task = quadratic([1.0] * 5, [0.0] * 5, 1.0, num_examples=[1, 2, 3, 4, 0])
    strategy = FedFix(interval=0.5, weights="observed", importance="num_examples", local=local_sgd(task, 1e-3, steps=1))
    _, total = _weights(Play.start(task, strategy, devices=Clocks(f_80())), 100)
    assert (total / 100).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.0], abs=1e-9)


@schemes
def test_the_problem_that_is_solved_is_the_one_that_was_posed(make: Callable[..., Any], off: float) -> None:
    a, b = [0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0]
    task = quadratic(a, b, 8 / 3)  # with identical weights asynchronous FedAvg goes to 3.27586
    x = play(task, make(weights="observed", local=local_sgd(task, 2e-3, steps=1)), 1500, devices=Clocks(f_80()))
    assert float(x[500:].mean()) == pytest.approx(8 / 3, abs=0.03)


def test_nobody_is_asked_for_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = noisy(steps=1)
    game = Play.start(task, FedFix(interval=0.5, weights="observed", local=local_sgd(task, steps=1)))
    monkeypatch.delattr("fedsim.sim.fleet.SimFleet.job_times")
    game.path(3)
    assert int(game.state.arrivals.sum()) > 0


def test_an_arrival_that_a_robust_rule_could_not_judge_is_none() -> None:
    task, _ = noisy(steps=1)
    strategy = FedFix(
        interval=0.3, weights="observed", aggregator=TrimmedMean(f=1), local=local_sgd(task, 0.05, steps=1)
    )
    game = Play.start(task, strategy, devices=Clocks(f_80()))
    for _ in range(12):
        before = game.state.arrivals
        counted = "too_few" not in game.step()
        grew = game.state.arrivals - (before if len(before) else 0)
        assert grew.nonzero().flatten().tolist() == (sorted(game.state.idle.tolist()) if counted else [])


def test_what_was_observed_survives_a_stop(tmp_path: Path) -> None:
    config = {
        "rounds": 12,
        "task": {"name": "quadratic", "dim": 3},
        "clients": {"count": 5, "devices": {"name": "f_x", "x": 80}},
        "strategy": {"name": "async_fedavg", "weights": "observed"},
        "local": {"steps": 2, "optimizer": {"name": "sgd", "lr": 0.01}},
    }
    whole = rows_of(config)
    rows_of({**config, "rounds": 7}, tmp_path)
    assert rows_of(config, tmp_path, resume=True) == whole[7:]
