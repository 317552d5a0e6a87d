"""Strategies whose clients have whole models of their own (ditto, pfedme, apfl): twins, special cases, closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.strategies.apfl import APFL
from fedsim.strategies.ditto import Ditto
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.pfedme import PFedMe
from fedsim.tasks.models import mlp, resnet_bn
from tests.build import Play, digits_task, local_sgd, play, quadratic, two_clients
from tests.reference.clients import Clients
from tests.reference.personal import apfl, ditto, pfedme, steps
from tests.strategies.personal import own_models
from tests.strategies.tasks import images, noisy


def _alone(twin: Clients, x: Tensor, run: Play, eta: float) -> Tensor:
    """[n, P]: local training alone for as many jobs as each client had."""
    models = []
    for i in range(twin.n):
        y = x
        for job in range(int(run.fleet.job_counts[i])):
            y = steps(twin, i, y, job, eta)
        models.append(y)
    return torch.stack(models)


def _fedavg(task: Any, rounds: int, size: int | None, num_steps: int = 3) -> Tensor:
    return play(task, FedAvg(cohort_size=size, local=local_sgd(task, 0.05, steps=num_steps)), rounds)


# Ditto -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_ditto_equals_its_twin_beside_fedavg(size: int | None, lam: float) -> None:
    task, twin = noisy(steps=3)
    run = Play.start(task, Ditto(cohort_size=size, lam=lam, local=local_sgd(task, 0.05, steps=3)), width=2)
    assert torch.equal(run.path(8), Play.start(task, _plain(task, size), width=2).path(8))
    torch.testing.assert_close(
        own_models(run), ditto(twin, task.x0, 8, eta=0.05, lam=lam, size=size), rtol=0, atol=1e-12
    )
    if not lam:
        torch.testing.assert_close(own_models(run), _alone(twin, task.x0, run, 0.05), rtol=0, atol=1e-12)


def _plain(task: Any, size: int | None) -> FedAvg:
    return FedAvg(cohort_size=size, local=local_sgd(task, 0.05, steps=3))


def test_ditto_equals_a_plain_loop_of_autograd_on_a_network() -> None:
    task, twin = images(mlp, [7, 20, 1, 0, 13, 9], 5)
    run = Play.start(task, Ditto(lam=0.5, local=local_sgd(task, 0.2, epochs=1, steps=None, batch_size=5)), width=4)
    run.path(3)
    torch.testing.assert_close(own_models(run), ditto(twin, task.x0, 3, eta=0.2, lam=0.5), rtol=1e-4, atol=2e-5)


def test_dittos_own_models_go_where_the_pulled_loss_is_least() -> None:
    task = two_clients()
    run = Play.start(task, Ditto(lam=1.0, local=local_sgd(task, 0.1, steps=1)))
    x = run.path(400)[-1]  # one step with all clients: the server is at the optimum 0.75
    a, b = torch.tensor([[1.0], [3.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
    torch.testing.assert_close(own_models(run), (a * b + x) / (a + 1), rtol=0, atol=1e-9)
    assert own_models(run)[:, 0].tolist() == pytest.approx([0.375, 0.9375])


# pFedMe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, beta", [(None, 1.0), (2, 0.6)])
def test_pfedme_equals_its_twin(size: int | None, beta: float) -> None:
    task, twin = noisy(steps=3)
    rates = {"lam": 2.0, "inner_steps": 4, "inner_lr": 0.1}
    strategy = PFedMe(cohort_size=size, server_lr=beta, local=local_sgd(task, 0.2, steps=3), **rates)  # type: ignore[arg-type]
    run = Play.start(task, strategy, width=2)
    path, models = pfedme(twin, task.x0, 8, eta=0.2, beta=beta, size=size, **rates)  # type: ignore[arg-type]
    torch.testing.assert_close(run.path(8), path, rtol=0, atol=1e-12)
    torch.testing.assert_close(own_models(run), models, rtol=0, atol=1e-12)


def test_pfedme_equals_a_plain_loop_of_autograd_on_a_network() -> None:
    task, twin = images(mlp, [7, 20, 1, 0, 13, 9], 5)
    local = local_sgd(task, 0.05, epochs=1, steps=None, batch_size=5)
    run = Play.start(task, PFedMe(lam=5.0, inner_steps=2, inner_lr=0.1, local=local), width=4)
    path, models = pfedme(twin, task.x0, 3, eta=0.05, lam=5.0, inner_steps=2, inner_lr=0.1)
    torch.testing.assert_close(run.path(3), path, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(own_models(run)[[0, 1, 2, 4, 5]], models[[0, 1, 2, 4, 5]], rtol=1e-4, atol=2e-5)


def test_pfedme_with_one_local_step_minimises_the_mean_of_the_envelopes() -> None:
    task, lam = two_clients(), 1.0
    run = Play.start(task, PFedMe(lam=lam, inner_steps=60, inner_lr=0.2, local=local_sgd(task, 0.3, steps=1)))
    x = run.path(200)[-1]  # envelopes curve by lam a / (a + lam), so x = (0.5 * 0 + 0.75 * 1) / 1.25
    assert float(x) == pytest.approx(0.6, abs=1e-9)
    assert own_models(run)[:, 0].tolist() == pytest.approx([0.3, 0.9], abs=1e-9)  # (a b + lam x) / (a + lam)


def test_a_step_of_pfedme_with_an_exact_inner_solution_is_one_along_the_envelope() -> None:
    task = quadratic([2.0], [1.0], 3.0)
    run = Play.start(task, PFedMe(lam=4.0, inner_steps=100, inner_lr=0.1, local=local_sgd(task, 0.1, steps=1)))
    assert run.path(1).item() == pytest.approx(3.0 - 0.1 * (4 * 2 / (4 + 2)) * (3.0 - 1.0))


# APFL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("alpha, adaptive", [(0.3, False), (0.3, True), (0.9, True)])
def test_apfl_equals_its_twin(size: int | None, alpha: float, adaptive: bool) -> None:
    task, twin = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    run = Play.start(task, APFL(cohort_size=size, alpha=alpha, adaptive=adaptive, local=local), width=2)
    path, models, shares = apfl(twin, task.x0, 8, eta=0.05, alpha=alpha, adaptive=adaptive, size=size)
    torch.testing.assert_close(run.path(8), path, rtol=0, atol=1e-12)
    torch.testing.assert_close(own_models(run), models, rtol=0, atol=1e-12)
    assert (len(set(shares)) > 1) == adaptive
    torch.testing.assert_close(path, _fedavg(task, 8, size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_apfl_are_fedavg_and_local_training_alone(alpha: float) -> None:
    task, twin = noisy(steps=3)
    run = Play.start(task, APFL(cohort_size=2, alpha=alpha, local=local_sgd(task, 0.05, steps=3)))
    x = run.path(8)[-1]
    torch.testing.assert_close(x, _fedavg(task, 8, 2)[-1], rtol=0, atol=1e-12)
    expected = _alone(twin, task.x0, run, 0.05) if alpha else x.expand(twin.n, -1)
    torch.testing.assert_close(own_models(run), expected, rtol=0, atol=1e-12)


def test_apfl_equals_a_plain_loop_of_autograd_on_a_network() -> None:
    task, twin = images(mlp, [7, 20, 1, 0, 13, 9], 5)
    local = local_sgd(task, 0.2, epochs=1, steps=None, batch_size=5)
    run = Play.start(task, APFL(alpha=0.4, adaptive=True, local=local), width=4)
    path, models, _ = apfl(twin, task.x0, 3, eta=0.2, alpha=0.4, adaptive=True)
    torch.testing.assert_close(run.path(3), path, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(own_models(run), models, rtol=1e-4, atol=2e-5)


def test_an_adaptive_share_is_saved_and_said() -> None:
    task = quadratic([1.0, 1.0], [0.0, 4.0], 2.0)
    run = Play.start(task, APFL(alpha=0.5, adaptive=True, local=local_sgd(task, 0.1, steps=1)))
    run.step()
    assert run.seen["alpha"] == 0.5  # v = w at first, so that alpha's gradient is zero
    for _ in range(40):
        run.step()
    assert run.seen["alpha"] > 0.6  # the clients want different things, and the mean is nobody's


# Manners ---------------------------------------------------------------------------------------------------------


def test_buffers_of_own_models_follow_their_own_passes_and_all_stay_finite() -> None:
    task = digits_task(lambda shape, classes: resnet_bn(shape, classes, width=2, stages=1), [6, 0, 9])
    local = local_sgd(task, 0.1, steps=2, batch_size=3)
    for strategy in (Ditto(local=local), PFedMe(lam=2.0, local=local), APFL(local=local)):
        run = Play.start(task, strategy)
        moved = (run.path(2)[-1] != task.x0)[task.layout.num_trainable :]
        models = own_models(run)
        assert bool(models.isfinite().all()) and bool(moved.any()), strategy
        statistics = models[:, task.layout.num_trainable :]
        assert not torch.equal(statistics[0], statistics[2])


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (Ditto, {"lam": -1.0}, "lam pulls"),
        (Ditto, {"lam": float("inf")}, "lam pulls"),
        (PFedMe, {"lam": float("inf")}, "lam pulls"),
        (PFedMe, {"inner_lr": float("inf")}, "inner_lr must be positive"),
        (PFedMe, {"lam": 0.0}, "lam pulls"),
        (PFedMe, {"inner_steps": 0}, "inner_steps must be at least 1"),
        (PFedMe, {"inner_lr": 0.0}, "inner_lr must be positive"),
        (APFL, {"alpha": 1.5}, r"alpha is a share and must lie in \[0, 1\]"),
    ],
)
def test_bad_fields_are_refused(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(local=local_sgd(two_clients()), **fields)


def test_ditto_refuses_one_kept_state_for_two_models() -> None:
    task = two_clients()
    with pytest.raises(ValueError, match="set local.optimizer.state_scope: round"):
        Ditto(local=local_sgd(task, optimizer={"name": "adam", "lr": 0.1, "state_scope": "client"}))


@pytest.mark.parametrize("kind, gradients", [(Ditto, 2), (APFL, 2), (PFedMe, 5)])
def test_own_models_cost_gradients_and_no_bits(kind: Any, gradients: int) -> None:
    task = two_clients()
    run = Play.start(task, kind(local=local_sgd(task, 0.01, steps=3)))
    run.step()
    assert (run.fleet.ledger.bits_up, run.fleet.ledger.bits_down) == (2 * 32, 2 * 32)
    assert run.fleet.now == pytest.approx(0.01 * 3 * gradients)
