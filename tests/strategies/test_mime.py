"""Mime and MimeLite: their twin, one local step as the rule at the server, their limits, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.compress.sparsify import RandK
from fedsim.optim import build
from fedsim.sim.links import Downlink
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.mime import Mime
from fedsim.strategies.mime_lite import MimeLite
from fedsim.tasks.models import mlp, resnet_bn
from fedsim.tasks.quadratic import QuadraticTask
from fedsim.tasks.supervised import SupervisedTask
from tests.build import Clocks, Play, digits_task, local_sgd, play, quadratic, two_clients, watched
from tests.reference.mime import Adam, HeavyBall, mime
from tests.strategies.tasks import images, noisy

HEAVY = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "ema": True}
ADAM = {"name": "adam", "lr": 0.05, "eps": 1e-8}
kinds = pytest.mark.parametrize("kind", [Mime, MimeLite])


def _base(spec: dict[str, Any], x: torch.Tensor) -> HeavyBall | Adam:
    zero = torch.zeros_like(x)
    return Adam(zero, zero) if spec["name"] == "adam" else HeavyBall(spec.get("momentum", 0.0), zero)


@kinds
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("spec", [{"name": "sgd", "lr": 0.05}, HEAVY, ADAM], ids=["sgd", "heavy ball", "adam"])
def test_equals_its_twin_on_noisy_quadratics(kind: Any, size: int | None, spec: dict[str, Any]) -> None:
    task, twin = noisy(steps=3)
    strategy = kind(cohort_size=size, server_lr=0.7, local=local_sgd(task, optimizer=spec, steps=3))
    expected = mime(
        twin,
        task.x0,
        8,
        eta=0.05,
        base=_base(spec, task.x0),
        full=lambda i, x, job: twin.gradient(i, x, job, 0),  # noise and all: a formula is one sample
        lite=kind is MimeLite,
        server_lr=0.7,
        size=size,
    )
    torch.testing.assert_close(play(task, strategy, 8, width=2), expected, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("spec", [{"name": "sgd", "lr": 0.1}, {**HEAVY, "lr": 0.1}], ids=["sgd", "heavy ball"])
def test_equals_a_plain_loop_of_autograd(kind: Any, spec: dict[str, Any]) -> None:
    task, twin = images(mlp, [7, 20, 1, 13], 5, steps=4)
    strategy = kind(cohort_size=3, local=local_sgd(task, optimizer=spec, steps=4, batch_size=5))
    full, base = (lambda i, x, job: twin.full(i, x)), _base(spec, task.x0)
    expected = mime(twin, task.x0, 4, eta=0.1, base=base, full=full, lite=kind is MimeLite, size=3)
    torch.testing.assert_close(play(task, strategy, 4, width=2), expected, rtol=1e-4, atol=2e-5)


def test_steps_in_factors_equal_a_plain_loop_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    real = SupervisedTask.factored_run
    monkeypatch.setattr(SupervisedTask, "factored_run", lambda *of: found.append(real(*of)) or found[-1])
    task, twin = images(lambda shape, k: mlp(shape, k, hidden=(200, 100)), [7, 20, 1, 13], 5, steps=2)
    game = Play.start(task, Mime(local=local_sgd(task, 0.1, steps=2, batch_size=5)), width=3)
    base = HeavyBall(0.0, torch.zeros_like(task.x0))
    expected = mime(twin, task.x0, 4, eta=0.1, base=base, full=lambda i, x, job: twin.full(i, x))
    torch.testing.assert_close(game.path(4), expected, rtol=1e-4, atol=2e-5)
    assert len(found) == 8 and all(run is not None for run in found)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "sgd", "lr": 0.1},
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"name": "adamw", "lr": 0.05, "weight_decay": 0.1, "decay_vectors": True},
        {"name": "nadam", "lr": 0.02},
        {"name": "adagrad", "lr": 0.1},
        {"name": "lion", "lr": 0.02},
        {"name": "lamb", "lr": 0.02},
        {"name": "adam", "lr": 0.1, "clip": {"global": 0.3}, "schedule": {"name": "exponential", "gamma": 0.9}},
    ],
    ids=lambda spec: spec["name"],
)
def test_one_local_step_is_the_rule_at_the_server_along_the_mean_gradient(spec: dict[str, Any]) -> None:
    task, _ = noisy(steps=1)
    task = QuadraticTask(task.a, task.b, task.x0)
    found = play(task, Mime(local=local_sgd(task, optimizer=spec, steps=1, rounds=12)), 12)
    rule, y, path = build(spec, task.layout), task.x0[None].clone(), []
    state = rule.init(y)
    for r in range(12):
        g = task.formula(y.expand(5, -1), torch.arange(5))[0].mean(0, keepdim=True)
        rule.step_(y, g, state, lr_scale=1.0 if rule.schedule is None else rule.schedule.at_step(rounds=r, steps=r))
        path.append(y[0].clone())
    torch.testing.assert_close(found, torch.stack(path), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", [None, {**HEAVY, "lr": 0.1}], ids=["sgd", "heavy ball"])
def test_mime_reaches_the_solution_and_mime_lite_the_limit_of_fedavg(spec: Any) -> None:
    task = two_clients()
    ours = play(task, Mime(local=local_sgd(task, optimizer=spec)), 400)[-1]
    lite = play(task, MimeLite(local=local_sgd(task, optimizer=spec)), 400)[-1]
    assert float(ours) == pytest.approx(0.75, abs=1e-9)
    assert float(lite) == pytest.approx(0.598711, abs=1e-6) if spec is None else abs(float(lite) - 0.75) > 1e-3


def test_mime_of_plain_sgd_walks_as_worked_out() -> None:
    # client i: y <- y - eta (a_i (y - x) + c), so that after K steps x - y = (1 - (1 - eta a_i)^K) / a_i * c
    moved = sum((1 - (1 - 0.1 * a) ** 10) / a for a in (1.0, 3.0)) / 2
    x, expected = 2.0, []
    for _ in range(5):
        x -= moved * (2 * x - 1.5)
        expected.append(x)
    found = play(two_clients(), Mime(local=local_sgd(two_clients())), 5)[:, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_mime_lite_of_plain_sgd_is_fedavg() -> None:
    task, _ = noisy(steps=3)
    local = local_sgd(task, 0.05, steps=3)
    ours, theirs = (play(task, kind(cohort_size=2, local=local), 8) for kind in (MimeLite, FedAvg))
    assert torch.equal(ours, theirs)


def test_identical_clients_without_noise_make_mime_and_mime_lite_one() -> None:
    task = quadratic([[1.0, 2.0]] * 4, [[3.0, -1.0]] * 4, [0.0, 0.0])
    one, other = (play(task, kind(local=local_sgd(task, optimizer=HEAVY)), 6) for kind in (Mime, MimeLite))
    one_step = play(task, Mime(local=local_sgd(task, optimizer=HEAVY, steps=1)), 6)
    torch.testing.assert_close(one[:1], other[:1], rtol=0, atol=1e-12)
    assert not torch.allclose(one, one_step)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# What travels ----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("spec, states", [(None, 0), (HEAVY, 1), (ADAM, 2)], ids=["sgd", "heavy ball", "adam"])
def test_a_round_costs_what_the_paper_counts_and_the_counter(kind: Any, spec: Any, states: int) -> None:
    task, _ = noisy(steps=2)
    game = Play.start(task, kind(cohort_size=3, local=local_sgd(task, 0.05, optimizer=spec, steps=2)))
    vector, counter = 32 * 3, 32 * (states > 0)  # the rule's own count of steps is one number more
    for r in range(1, 4):
        game.step()
        down = (2 if kind is Mime else 1) + states
        assert game.fleet.ledger.bits_down == r * 3 * (down * vector + counter)
        assert game.fleet.ledger.bits_up == r * 3 * 2 * vector
        assert game.seen["num_clients"] == 3


def test_both_halves_of_a_round_are_one_job_and_take_their_time_one_after_the_other() -> None:
    task, _ = noisy(steps=2)
    seen = watched(task)
    game = Play.start(task, Mime(local=local_sgd(task, 0.05, steps=2)), devices=Clocks((1.0,) * 5))
    game.path(3)
    assert {key[1] for key in seen} == {0, 1, 2} and game.fleet.now == pytest.approx(6.0)


def test_behind_a_compressed_downlink_clients_hold_the_model_that_they_were_sent() -> None:
    # one of three numbers at a time: what clients know of x differs from x, and both halves start from it
    task = quadratic([[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], [1.0, 2.0, 3.0])
    game = Play.start(task, Mime(local=local_sgd(task, 0.5, steps=1)), downlink=Downlink(compressor=RandK(k=1), seed=0))
    known, points = [], []
    inner = task.field

    def field(x: torch.Tensor, batch: Any) -> Any:
        points.append(x[0].clone())
        return inner(x, batch)

    task.field = field  # type: ignore[method-assign]
    for _ in range(4):
        points.clear()
        game.step()
        assert game.fleet.downlink is not None
        known.append(game.fleet.downlink.copies["x"].value)
        assert all(torch.equal(p, known[-1]) for p in points) and len(points) == 3
    assert not torch.equal(known[-1], game.state.x)


# Ordinary troubles -----------------------------------------------------------------------------------------------


@kinds
def test_models_with_buffers_are_trained_and_their_counts_stay_the_clients_mean(kind: Any) -> None:
    task = digits_task(resnet_bn, [8, 8])
    local = local_sgd(task, steps=2, batch_size=4, optimizer={**HEAVY, "lr": 0.01})
    x = play(task, kind(local=local), 3)[-1]
    views = task.layout.views(x)
    assert {float(v) for k, v in views.items() if "num_batches_tracked" in k} == {6.0}
    assert bool(x.isfinite().all())


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"state_scope": "client"}, "state_scope: client keeps the state elsewhere"),
        ({"state_scope": "server"}, "state_scope: server is not for this strategy"),
        ({"average": {"name": "ema"}}, "average is made of the steps that one client takes"),
        ({"name": "schedule_free_sgd"}, "sends another point than the one it steps from"),
        ({"name": "sgld"}, "needs more than a gradient \\(grad, noise\\)"),
        ({"name": "sophia_h"}, "needs more than a gradient"),
        ({"name": "mezo"}, "needs more than a gradient \\(loss_eval\\)"),
    ],
)
@kinds
def test_an_optimizer_whose_state_the_server_cannot_keep_is_refused(
    kind: Any, spec: dict[str, Any], message: str
) -> None:
    task, _ = noisy(steps=2)
    with pytest.raises(ValueError, match=message):
        kind(local=local_sgd(task, optimizer={"name": "adam", "lr": 0.1, **spec}))
