"""SCAFFOLD, SCAFFOLD-M and SCAFFOLD-M-VR: reductions to their parents, limits, and c as the mean of the c_i."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fedsim.optim import build
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldM
from fedsim.strategies.scaffold_m_vr import ScaffoldMVR
from tests.build import Play, local_sgd, play, quadratic, two_clients
from tests.strategies.tasks import noisy

KINDS = [Scaffold, partial(Scaffold, option="I"), partial(ScaffoldM, beta=0.3), partial(ScaffoldMVR, beta=0.3)]
every = pytest.mark.parametrize("kind", KINDS, ids=["option II", "option I", "momentum", "reduced"])


@every
@pytest.mark.parametrize("size", [None, 1])
def test_limit_is_the_optimum_whatever_the_local_steps(kind: Any, size: int | None) -> None:
    task = two_clients()
    x = play(task, kind(cohort_size=size, local=local_sgd(task, 0.05, steps=5)), 150)
    assert float(x[-1]) == pytest.approx(0.75, abs=1e-6)


@every
def test_c_is_the_mean_of_all_control_variates_at_all_times(kind: Any) -> None:
    task, _ = noisy(steps=3)
    play = Play.start(task, kind(cohort_size=2, local=local_sgd(task, 0.05, steps=3)))
    for _ in range(12):
        play.step()
        rows = play.fleet.memory.of(play.fleet.clients)["c"]
        torch.testing.assert_close(play.state.c, rows.mean(0), rtol=0, atol=1e-13)


def test_one_client_is_plain_sgd() -> None:
    task = quadratic([2], [1], 3)
    x = play(task, Scaffold(local=local_sgd(task, 0.1, steps=4)), 3)[:, 0].tolist()
    assert x == pytest.approx([1 + 2 * 0.8 ** (4 * r) for r in (1, 2, 3)])


def test_momentum_in_the_local_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="corrects the direction"):
        Scaffold(local=local_sgd(two_clients(), optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9}))


@pytest.mark.parametrize("kind", [ScaffoldM, ScaffoldMVR])
@pytest.mark.parametrize("size", [None, 2])
def test_beta_one_is_scaffold(kind: Any, size: int | None) -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    parent = play(task, Scaffold(cohort_size=size, local=local), 10)
    ours = play(task, kind(cohort_size=size, beta=1.0, local=local), 10)
    torch.testing.assert_close(ours, parent, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, parent", [(ScaffoldM, FedAvgM), (ScaffoldMVR, FedAvgMVR)])
def test_identical_clients_need_no_control_variates(kind: type, parent: type) -> None:
    task = quadratic([2, 2, 2], [1, 1, 1], 3)
    local = local_sgd(task, 0.1, steps=3)
    ours, theirs = (play(task, k(beta=0.3, gamma=0.2, local=local), 10) for k in (kind, parent))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


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
