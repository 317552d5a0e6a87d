"""MoNNA and decentralised SGD: its twin under attack, what is left with f = 0, and who survives which attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.aggregate.coordinatewise import TrimmedMean
from fedsim.clients.byzantine import Alie, Attack, InnerProduct, Mimic, NotANumber, SignFlip, Silence
from fedsim.sim.byzantine import Byzantine
from fedsim.strategies.dsgd import DSGD
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.monna import Monna
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Play, build_fleet, drawn, local_sgd, play, quadratic
from tests.reference.peers import monna
from tests.strategies.tasks import noisy


def _lying(ids: list[int], attack: Attack) -> Byzantine:
    return Byzantine(ids=torch.tensor(ids), attack=attack, seed=0)


def _models(play: Play) -> Tensor:
    """[n, P]: every node's own model."""
    return play.fleet.memory.of(play.fleet.clients)["x"]


@pytest.mark.parametrize("arrival", ["all", "adversarial"])
@pytest.mark.parametrize(
    "attack, lie",
    [(SignFlip(), lambda mean: -mean), (InnerProduct(tau=3.0), lambda mean: -3.0 * mean)],
    ids=["sign flip", "foe"],
)
def test_equals_its_twin_under_attack(arrival: Any, attack: Attack, lie: Callable[[Tensor], Tensor]) -> None:
    task, clients = noisy(steps=1, clients=9)
    strategy = Monna(beta=0.7, f=2, arrival=arrival, local=local_sgd(task, 0.2, steps=1))
    play = Play.start(task, strategy, byzantine=_lying([1, 6], attack), width=4)
    honest = [i for i in range(9) if i not in (1, 6)]
    rule: dict[str, Any] = {"lr": 0.2, "beta": 0.7, "f": 2, "arrival": arrival, "byzantine": [1, 6], "attack": lie}
    for theta in monna(clients, task.x0, 12, **rule):
        spread = play.step()["honest_spread"]
        torch.testing.assert_close(_models(play)[honest], theta[honest], rtol=0, atol=1e-12)
        mean = theta[honest].mean(0)
        torch.testing.assert_close(play.state.x, mean, rtol=0, atol=1e-12)
        assert spread == pytest.approx(float((theta[honest] - mean).square().sum(1).mean()), abs=1e-12)


def test_without_faults_monna_is_dsgd_and_so_minibatch_sgd_with_n_workers() -> None:
    task, _ = noisy(steps=1)
    local = local_sgd(task, 0.1, steps=1)
    ours = play(task, Monna(beta=0.0, f=0, local=local), 10)
    torch.testing.assert_close(ours, play(task, DSGD(local=local), 10), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, play(task, FedAvg(local=local), 10), rtol=0, atol=1e-12)


def test_without_faults_momentum_is_the_servers_heavy_ball_with_dampening() -> None:
    task = drawn(4, 3)
    x, m, expected = task.x0, torch.zeros(3, dtype=torch.float64), []
    for _ in range(10):
        m = 0.9 * m + (1 - 0.9) * (task.a * (x - task.b)).mean(0)
        x = x - 0.3 * m
        expected.append(x)
    got = play(task, Monna(beta=0.9, f=0, local=local_sgd(task, 0.3, steps=1)), 10)
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-12)


def test_without_faults_all_nodes_agree_after_every_step() -> None:
    task, _ = noisy(steps=1)
    play = Play.start(task, Monna(beta=0.9, f=0, local=local_sgd(task, 0.1, steps=1)))
    for _ in range(5):
        assert play.step()["honest_spread"] == pytest.approx(0.0, abs=1e-28)
        assert bool((_models(play) == _models(play)[0]).all())


def test_a_single_node_is_sgd_with_momentum() -> None:
    task = quadratic([2.0], [1.0], 3.0)
    x, m, expected = 3.0, 0.0, []
    for _ in range(8):
        m = 0.5 * m + 0.5 * 2 * (x - 1)
        x -= 0.3 * m
        expected.append(x)
    got = play(task, Monna(beta=0.5, f=0, local=local_sgd(task, 0.3, steps=1)), 8)[:, 0].tolist()
    assert got == pytest.approx(expected, abs=1e-12)


def test_the_first_step_starts_from_a_copy_of_the_common_model() -> None:
    # the authors' code lets all first momenta act on one shared tensor; here h_i = x0 - lr (1 - beta) g_i
    task = quadratic([1.0, 1.0], [1.0, -3.0], 0.0)
    x = play(task, Monna(beta=0.5, f=0, local=local_sgd(task, 0.1, steps=1)), 1)
    assert float(x) == pytest.approx(-0.1 * 0.5 * (-1 + 3) / 2)


def _far() -> QuadraticTask:
    """Minimisers around (3, ..., 3), so that a flipped sign points elsewhere."""
    task = drawn(16, 5)
    task.b = task.b + 3
    return task


def _away(task: QuadraticTask, strategy: Any, attack: Attack | None, rounds: int = 60) -> float:
    """Distance of the final model to the honest clients' optimum; the last two of 16 lie."""
    lies = None if attack is None else _lying([14, 15], attack)
    x = play(task, strategy, rounds, byzantine=lies)[-1]
    return float((x - (task.a * task.b)[:14].sum(0) / task.a[:14].sum(0)).norm())


@pytest.mark.parametrize(
    "attack",
    [SignFlip(), InnerProduct(tau=1.1 * 16 - 1), Alie(k=3.0), Mimic(), Silence(), NotANumber()],
    ids=["sign flip", "foe", "alie", "mimic", "silence", "nan"],
)
@pytest.mark.parametrize("arrival", ["all", "adversarial"])
def test_monna_stays_near_the_honest_optimum_under_every_attack(attack: Attack, arrival: Any) -> None:
    task = _far()
    strategy = Monna(beta=0.9, f=2, arrival=arrival, local=local_sgd(task, 0.2, steps=1))
    assert _away(task, strategy, attack) < 0.6  # the start is more than 4 away


def test_plain_averaging_is_ruined_by_sign_flip_foe_and_nan() -> None:
    task = _far()
    local = local_sgd(task, 0.2, steps=1)
    assert _away(task, DSGD(local=local), None) < 0.3  # the two that may lie count too
    robust = _away(task, Monna(beta=0.0, f=2, local=local), SignFlip())
    assert _away(task, DSGD(local=local), SignFlip()) > 2 * robust
    assert _away(task, DSGD(local=local), InnerProduct(tau=40.0)) > 1e3
    assert not _away(task, DSGD(local=local), NotANumber()) < 1e9


@pytest.mark.parametrize("attack", [InnerProduct(tau=20.0), Alie(k=3.0), Silence()])
def test_a_server_with_a_trimmed_mean_holds_where_the_mean_does_not(attack: Attack) -> None:
    task = _far()
    local = local_sgd(task, 0.2, steps=2)
    trimmed = FedAvg(aggregator=TrimmedMean(f=2), local=local)
    if isinstance(attack, Silence):  # 14 rows arrive; trimming two on either side is still defined
        assert _away(task, trimmed, attack) < 0.6
        assert _away(task, FedAvg(aggregator=Mean(), local=local), attack) < 0.2
    else:
        assert _away(task, trimmed, attack) < min(0.8, _away(task, FedAvg(local=local), attack))


def test_the_rate_follows_its_schedule() -> None:
    task = quadratic([1.0, 1.0], [0.0, 0.0], 1.0)
    rule = {"name": "sgd", "lr": 0.5, "schedule": {"name": "exponential", "gamma": 0.5}}
    local = local_sgd(task, steps=1, optimizer=rule)
    for strategy in (DSGD(local=local), Monna(beta=0.0, local=local)):
        assert play(task, strategy, 3)[:, 0].tolist() == pytest.approx([0.5, 0.5 * 0.75, 0.5 * 0.75 * 0.875])


@pytest.mark.parametrize("f, arrival", [(3, "all"), (2, "adversarial"), (2, "all")])
def test_f_too_large_for_n_is_refused(f: int, arrival: Any) -> None:
    task = quadratic([1.0] * 4, [0.0] * 4, 1.0)
    with pytest.raises(ValueError, match=f"f: {f} is too large for peer 0, which hears 4 vectors"):
        strategy = Monna(f=f, arrival=arrival, local=local_sgd(task, steps=1))
        strategy.check_fleet(build_fleet(task, strategy), task.x0)


def test_a_local_rule_with_momentum_of_its_own_is_refused() -> None:
    task = quadratic([1.0], [0.0], 1.0)
    local = local_sgd(task, optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9})
    for kind in (DSGD, Monna):
        with pytest.raises(ValueError, match="takes its own step"):
            kind(local=local)
