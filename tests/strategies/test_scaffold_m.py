"""SCAFFOLD-M and SCAFFOLD-M-VR: twins, reductions to their parents, limits, and c as the mean of the c_i."""

from __future__ import annotations

import pytest
import torch

from fedsim.optim import build
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldM
from fedsim.strategies.scaffold_m_vr import ScaffoldMVR
from fedsim.tasks.models import mlp
from tests.build import Play, local_sgd, play, quadratic, two_clients
from tests.reference.scaffold_m import scaffold_m
from tests.strategies.tasks import images, noisy

both = pytest.mark.parametrize("kind", [ScaffoldM, ScaffoldMVR])
sizes = pytest.mark.parametrize("size", [None, 2])


@both
@sizes
def test_equals_its_twin_on_noisy_quadratics(kind: type, size: int | None) -> None:
    task, twin = noisy(steps=3)
    strategy = kind(cohort_size=size, beta=0.3, gamma=0.1, local=local_sgd(task, 0.05, steps=3))
    expected = scaffold_m(twin, task.x0, 8, eta=0.05, beta=0.3, gamma=0.1, size=size, reduced=kind is ScaffoldMVR)
    torch.testing.assert_close(play(task, strategy, 8), expected, rtol=0, atol=1e-12)


@both
def test_equals_a_plain_loop_of_autograd(kind: type) -> None:
    task, twin = images(mlp, [7, 20, 1, 13], 5, steps=4)
    strategy = kind(cohort_size=3, beta=0.4, local=local_sgd(task, 0.1, steps=4, batch_size=5))
    expected = scaffold_m(twin, task.x0, 4, eta=0.1, beta=0.4, gamma=0.4, size=3, reduced=kind is ScaffoldMVR)
    torch.testing.assert_close(play(task, strategy, 4, width=2), expected, rtol=1e-4, atol=5e-5)


@both
@sizes
def test_beta_one_is_scaffold(kind: type, size: int | None) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    parent = play(task, Scaffold(cohort_size=size, local=local), 10)
    torch.testing.assert_close(
        play(task, kind(cohort_size=size, beta=1.0, local=local), 10), parent, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind, parent", [(ScaffoldM, FedAvgM), (ScaffoldMVR, FedAvgMVR)])
def test_identical_clients_need_no_control_variates(kind: type, parent: type) -> None:
    task = quadratic([2, 2, 2], [1, 1, 1], 3)
    local = local_sgd(task, 0.1, steps=3)
    ours, theirs = (play(task, k(beta=0.3, gamma=0.2, local=local), 10) for k in (kind, parent))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "kind, gamma, first",
    [(ScaffoldM, 1.0, [1.77309, 1.39838, 0.969939]), (ScaffoldMVR, 0.1, [1.98863, 1.97248, 1.95471])],
)
def test_two_clients_walk_as_worked_out(kind: type, gamma: float, first: list[float]) -> None:
    x = play(two_clients(), kind(beta=0.1, gamma=gamma, local=local_sgd(two_clients())), 3)[:, 0]
    assert x.tolist() == pytest.approx(first, abs=6e-6)


@both
@pytest.mark.parametrize("size", [None, 1])
def test_limit_is_the_optimum_also_with_half_the_clients(kind: type, size: int | None) -> None:
    task = two_clients()
    strategy = kind(cohort_size=size, beta=0.3, gamma=0.3, local=local_sgd(task, 0.02, steps=5))
    assert float(play(task, strategy, 150)[-1]) == pytest.approx(0.75, abs=1e-6)


@both
def test_c_is_the_mean_of_all_control_variates_at_all_times(kind: type) -> None:
    task, _ = noisy(steps=3)
    play = Play.start(task, kind(cohort_size=2, beta=0.3, local=local_sgd(task, 0.05, steps=3)))
    for _ in range(12):
        play.step()
        torch.testing.assert_close(
            play.state.c, play.fleet.memory.of(play.fleet.clients)["c"].mean(0), rtol=0, atol=1e-13
        )


def test_control_variates_are_means_of_raw_gradients() -> None:
    task = two_clients()
    play = Play.start(task, ScaffoldM(beta=0.1, gamma=1.0, local=local_sgd(task, 0.1, steps=2)))
    play.step()
    # c = c_i = g = 0 in the first round: y_1 = 2 - 0.1 * 0.1 * h_0, and c_i = (h_0 + h_1) / 2
    expected = []
    for a, b in ((1, 0), (3, 1)):
        h0 = a * (2 - b)
        expected.append((h0 + a * (2 - 0.01 * h0 - b)) / 2)
    assert play.fleet.memory.of(torch.arange(2))["c"][:, 0].tolist() == pytest.approx(expected)


def test_a_server_optimizer_steps_along_gamma_times_g() -> None:
    task = two_clients()
    local, plain = local_sgd(task), {"beta": 0.3, "gamma": 0.5}
    rule = build({"name": "sgd", "lr": 1.0}, task.layout)
    ours = play(task, ScaffoldM(server_optimizer=rule, local=local, **plain), 6)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, play(task, ScaffoldM(local=local, **plain), 6), rtol=0, atol=1e-12)  # type: ignore[arg-type]
