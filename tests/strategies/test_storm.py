"""STEM and MB-STORM: their twins, each other, and the solution that drift does not hide from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.mb_storm import MBStorm
from fedsim.strategies.stem import Stem
from fedsim.tasks.models import mlp, resnet_bn
from fedsim.tasks.quadratic import QuadraticTask
from fedsim.tasks.supervised import SupervisedTask
from tests.build import Play, digits_task, local_sgd, play, quadratic, two_clients
from tests.reference.clients import Formulas
from tests.reference.storm import mb_storm, stem
from tests.strategies.tasks import images, noisy

# Twins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_stem_equals_its_twin_on_noisy_quadratics(a: float) -> None:
    task, twin = noisy(steps=3)
    game = Play.start(task, Stem(a=a, local=local_sgd(task, 0.05, steps=3)), width=2)
    models, momenta = stem(twin, task.x0, 6, eta=0.05, a=a, full=lambda i, x: twin.gradient(i, x, 0, 0))
    found = game.path(6, lambda s: torch.stack([s.x, s.d]))
    torch.testing.assert_close(found, torch.stack([models, momenta], 1), rtol=0, atol=1e-12)


def test_stem_equals_a_plain_loop_of_autograd() -> None:
    task, twin = images(mlp, [7, 20, 1, 13], 5, steps=3)
    x = play(task, Stem(a=0.4, local=local_sgd(task, 0.1, steps=3, batch_size=5)), 4, width=2)
    expected, _ = stem(twin, task.x0, 4, eta=0.1, a=0.4, full=twin.full)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("size", [None, 2])
def test_mb_storm_equals_its_twin_on_noisy_quadratics(size: int | None) -> None:
    task, twin = noisy(steps=3)
    strategy = MBStorm(cohort_size=size, beta=0.3, gamma=0.1, local=local_sgd(task, steps=3))
    expected = mb_storm(twin, task.x0, 8, beta=0.3, gamma=0.1, size=size)
    torch.testing.assert_close(play(task, strategy, 8, width=2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("hidden", [8, 200])
def test_mb_storm_equals_a_plain_loop_of_autograd(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_factors = []
    real = SupervisedTask.factored_gradients
    monkeypatch.setattr(
        SupervisedTask, "factored_gradients", lambda *of: in_factors.append(real(*of)) or in_factors[-1]
    )
    task, twin = images(lambda shape, k: mlp(shape, k, hidden=(hidden,)), [7, 20, 1, 13], 5, steps=4)
    strategy = MBStorm(cohort_size=3, beta=0.4, local=local_sgd(task, 0.1, steps=4, batch_size=5))
    expected = mb_storm(twin, task.x0, 4, beta=0.4, gamma=0.4, size=3)
    torch.testing.assert_close(play(task, strategy, 4, width=2), expected, rtol=1e-4, atol=2e-5)
    assert all(found is not None for found in in_factors) and in_factors


# Special cases ---------------------------------------------------------------------------------------------------


def test_one_minibatch_makes_mb_storm_and_fedavg_m_vr_one() -> None:
    task, _ = noisy(steps=1)
    local = local_sgd(task, steps=1)
    ours, theirs = (play(task, k(cohort_size=3, beta=0.3, gamma=0.1, local=local), 10) for k in (MBStorm, FedAvgMVR))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def _exact(steps: int) -> tuple[QuadraticTask, Formulas]:
    task, twin = noisy(steps)
    return QuadraticTask(task.a, task.b, task.x0), Formulas(twin.a, twin.b, steps)


def test_one_step_a_round_makes_stem_storm_on_one_machine() -> None:
    task, twin = _exact(1)
    game = Play.start(task, MBStorm(beta=0.3, gamma=0.05, local=local_sgd(task, steps=1)))
    game.state = replace(game.state, g=sum(twin.full(i, task.x0) for i in range(5)) / 5)
    ours = play(task, Stem(a=0.3, local=local_sgd(task, 0.05, steps=1)), 10)
    torch.testing.assert_close(ours, game.path(10), rtol=0, atol=1e-12)


@pytest.mark.parametrize("a", [0.0, 0.2])
def test_clients_of_equal_curvature_follow_one_machine_however_rarely_they_are_averaged(a: float) -> None:
    # their gradients differ by constants, so that the mean of x_i and d_i walks as if there were one client
    b = torch.tensor([[0.0, 3.0], [1.0, -1.0], [5.0, 2.0]])
    task = quadratic(torch.tensor([[1.0, 2.0]] * 3), b, torch.tensor([4.0, 4.0]))
    rare = play(task, Stem(a=a, local=local_sgd(task, 0.05, steps=5)), 6)
    often = play(task, Stem(a=a, local=local_sgd(task, 0.05, steps=1)), 30)
    torch.testing.assert_close(rare, often[4::5], rtol=0, atol=1e-12)
    torch.testing.assert_close(often[0], task.x0 - 0.05 * task.a[0] * (task.x0 - b.double().mean(0)))


def test_stem_that_forgets_everything_is_local_sgd_one_step_late() -> None:
    task, twin = noisy(steps=3)
    found = play(task, Stem(a=1.0, local=local_sgd(task, 0.05, steps=3)), 4)
    x, d = task.x0, sum(twin.gradient(i, task.x0, 0, 0) for i in range(5)) / 5
    for r in range(4):
        ends = []
        for i in range(5):
            y = x - 0.05 * d
            for k in range(2):
                y = y - 0.05 * twin.gradient(i, y, r, k)
            ends.append((y, twin.gradient(i, y, r, 2)))
        x, d = (torch.stack(both).mean(0) for both in zip(*ends, strict=True))
        torch.testing.assert_close(found[r], x, rtol=0, atol=1e-12)


# Where they end --------------------------------------------------------------------------------------------------


def _rest(eta: float, steps: int, a: float) -> float:
    """Where STEM comes to rest on the two clients: (x, d) of each moves by a matrix, K times, and then is averaged."""
    mean = torch.zeros(3, 3, dtype=torch.float64)
    for curvature, at in ((1.0, 0.0), (3.0, 1.0)):
        row = [a * curvature, 1 - a - curvature * eta, -a * curvature * at]
        once = torch.tensor([[1.0, -eta, 0.0], row, [0.0, 0.0, 1.0]], dtype=torch.float64)
        mean += torch.linalg.matrix_power(once, steps) / 2
    return float(torch.linalg.solve(torch.eye(2, dtype=torch.float64) - mean[:2, :2], mean[:2, 2])[0])


@pytest.mark.parametrize("eta, steps, a", [(0.1, 10, 0.5), (0.1, 10, 0.1), (0.01, 2, 0.1), (0.1, 1, 0.1)])
def test_stem_comes_to_rest_where_the_mean_of_its_clients_maps_does(eta: float, steps: int, a: float) -> None:
    x = play(two_clients(), Stem(a=a, local=local_sgd(two_clients(), eta, steps=steps)), 600)
    assert float(x[-1]) == pytest.approx(_rest(eta, steps, a), abs=1e-8)


def test_the_bias_of_stem_vanishes_with_the_rate_and_without_drift() -> None:
    assert _rest(0.1, 1, 0.1) == pytest.approx(0.75, abs=1e-12)
    away = [abs(0.75 - _rest(eta, 10, 0.1)) for eta in (0.1, 0.01, 0.001)]
    assert away[0] < 0.75 - 0.598711 and away[1] < away[0] / 5 and away[2] < away[1] / 5


# What travels, and what is refused -------------------------------------------------------------------------------


def test_stem_sends_two_vectors_each_way_and_the_first_gradient_once() -> None:
    task, _ = noisy(steps=2)
    game = Play.start(task, Stem(local=local_sgd(task, 0.05, steps=2)))
    vector = 5 * 32 * 3
    game.step()
    assert (game.fleet.ledger.bits_down, game.fleet.ledger.bits_up) == (2 * vector, 3 * vector)  # x is held, d comes
    game.step()
    assert (game.fleet.ledger.bits_down, game.fleet.ledger.bits_up) == (4 * vector, 5 * vector)


def test_mb_storm_sends_two_models_down_and_a_vector_up() -> None:
    task, _ = noisy(steps=2)
    game = Play.start(task, MBStorm(cohort_size=2, local=local_sgd(task, 0.05, steps=2)))
    game.path(2)
    assert (game.fleet.ledger.bits_down, game.fleet.ledger.bits_up) == (2 * 2 * 2 * 96, 2 * 2 * 96)


def test_stem_trains_models_with_buffers() -> None:
    task = digits_task(resnet_bn, [8, 8])
    x = play(task, Stem(local=local_sgd(task, 0.01, steps=2, batch_size=4)), 3)[-1]
    views = task.layout.views(x)
    assert {float(v) for k, v in views.items() if "num_batches_tracked" in k} == {6.0}
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("a", [-0.1, 1.5])
def test_a_weight_outside_its_range_is_refused(a: float) -> None:
    with pytest.raises(ValueError, match="a is the weight of the fresh gradient and must lie in"):
        Stem(a=a, local=local_sgd(two_clients()))
