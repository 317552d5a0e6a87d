"""SCAFFOLD: its twin, its limit, and c as the mean of the c_i."""

from __future__ import annotations

import pytest
import torch

from fedsim.strategies.scaffold import Scaffold
from fedsim.tasks.models import mlp
from tests.build import Play, local_sgd, play, quadratic, two_clients
from tests.reference.scaffold import scaffold
from tests.strategies.tasks import images, noisy


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("size", [None, 2])
def test_equals_its_twin_on_noisy_quadratics(option: str, size: int | None) -> None:
    task, twin = noisy(steps=3)
    if option == "I":  # a full gradient has no noise
        task.noise = twin.noise = 0.0
    strategy = Scaffold(cohort_size=size, option=option, server_lr=0.8, local=local_sgd(task, 0.05, steps=3))  # type: ignore[arg-type]
    expected = scaffold(twin, task.x0, 8, eta=0.05, option=option, server_lr=0.8, size=size)
    torch.testing.assert_close(play(task, strategy, 8), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("option", ["I", "II"])
def test_equals_a_plain_loop_of_autograd(option: str) -> None:
    task, twin = images(mlp, [7, 20, 1, 13], 5, epochs=2)
    local = local_sgd(task, 0.2, epochs=2, steps=None, batch_size=5)
    strategy = Scaffold(cohort_size=3, option=option, local=local)  # type: ignore[arg-type]
    expected = scaffold(twin, task.x0, 4, eta=0.2, option=option, size=3)
    torch.testing.assert_close(play(task, strategy, 4, width=2), expected, rtol=1e-4, atol=5e-5)


def test_two_clients_walk_as_worked_out() -> None:
    x = play(two_clients(), Scaffold(local=local_sgd(two_clients())), 120)[:, 0]
    assert x[:3].tolist() == pytest.approx([0.862802, 0.675566, 0.683982], abs=5e-7)
    assert float(x[-1]) == pytest.approx(0.75, abs=1e-9)


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("size", [None, 1])
def test_limit_is_the_optimum_whatever_the_local_steps(option: str, size: int | None) -> None:
    task = two_clients()
    strategy = Scaffold(cohort_size=size, option=option, local=local_sgd(task, 0.05, steps=5))  # type: ignore[arg-type]
    assert float(play(task, strategy, 150)[-1]) == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("option", ["I", "II"])
def test_c_is_the_mean_of_all_control_variates_at_all_times(option: str) -> None:
    task, _ = noisy(steps=3)
    play = Play.start(task, Scaffold(cohort_size=2, option=option, local=local_sgd(task, 0.05, steps=3)))  # type: ignore[arg-type]
    for _ in range(12):
        play.step()
        torch.testing.assert_close(
            play.state.c, play.fleet.memory.of(play.fleet.clients)["c"].mean(0), rtol=0, atol=1e-13
        )


def test_one_client_is_plain_sgd() -> None:
    task = quadratic([2], [1], 3)
    x = play(task, Scaffold(local=local_sgd(task, 0.1, steps=4)), 3)[:, 0].tolist()
    assert x == pytest.approx([1 + 2 * 0.8 ** (4 * r) for r in (1, 2, 3)])


def test_a_client_without_data_keeps_its_control_variate_at_zero() -> None:
    task, _ = images(mlp, [6, 0, 9], 4)
    play = Play.start(task, Scaffold(local=local_sgd(task, 0.1, epochs=1, steps=None, batch_size=4)))
    play.path(2)
    rows = play.fleet.memory.of(torch.arange(3))["c"]
    assert rows[1].abs().max() == 0 and rows[0].abs().max() > 0
    torch.testing.assert_close(play.state.c, rows.mean(0), rtol=0, atol=1e-7)


def test_momentum_in_the_local_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="corrects the direction"):
        Scaffold(local=local_sgd(two_clients(), optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9}))
