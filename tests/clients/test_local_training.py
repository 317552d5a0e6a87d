"""Local training against plain loops: uneven clients, directions, schedules, and optimizers with state."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.clients.direction import GRADIENT, MODEL, gradient_at
from fedsim.clients.local_training import LocalTraining
from fedsim.optim import build
from fedsim.strategies.fedavg import FedAvg
from fedsim.task import Schedule
from fedsim.tasks.models import mlp, resnet_bn
from tests.build import Play, cohort, digits_task, drawn, local_sgd, quadratic
from tests.strategies.tasks import images

COUNTS = [20, 9, 4, 0]


def test_clients_of_any_size_walk_as_plain_loops_do() -> None:
    task, twin = images(mlp, COUNTS, 6, epochs=2)
    local = local_sgd(task, 0.2, epochs=2, steps=None, batch_size=6)
    result = local(cohort(task, [0, 1, 2, 3], [0, 4, 1, 0]), task.x0, mean_grad=True)
    assert result.steps.tolist() == [8, 4, 2, 0] and result.mean_grad is not None
    for i, job in enumerate([0, 4, 1, 0]):
        y, used = task.x0.clone(), torch.zeros_like(task.x0)
        for k in range(twin.steps(i)):
            g = twin.gradient(i, y, job, k)
            used += g
            y = y - 0.2 * g
        torch.testing.assert_close(result.delta.dense()[i], task.x0 - y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.mean_grad[i], used / max(twin.steps(i), 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["stacked", "loop"])
def test_a_direction_with_shift_scale_and_other_point_is_followed_step_by_step(engine: str) -> None:
    task, twin = images(mlp, COUNTS[:3], 6)
    task = digits_task(mlp, COUNTS[:3], engine)
    generator = torch.Generator().manual_seed(0)
    c_i, c = torch.randn(3, len(task.x0), generator=generator), torch.randn(len(task.x0), generator=generator)
    c_i, c, w = 0.01 * c_i, 0.01 * c, 0.9 * task.x0
    directions = {
        "shift": (0.5 * (GRADIENT - c_i + c), lambda i, y, k: 0.5 * (twin.gradient(i, y, 0, k) - c_i[i] + c)),
        "other": (
            GRADIENT + 0.7 * (c - gradient_at(w)),
            lambda i, y, k: twin.gradient(i, y, 0, k) + 0.7 * (c - twin.gradient(i, w, 0, k)),
        ),
    }
    local = local_sgd(task, 0.1, epochs=1, steps=None, batch_size=6)
    for name, (u, by_hand) in directions.items():
        result = local(cohort(task, [0, 1, 2]), task.x0, u, mean_grad=True)
        assert result.mean_grad is not None
        for i in range(3):
            y, used = task.x0.clone(), torch.zeros_like(task.x0)
            for k in range(twin.steps(i)):
                used += twin.gradient(i, y, 0, k)
                y = y - 0.1 * by_hand(i, y, k)
            torch.testing.assert_close(result.delta.dense()[i], task.x0 - y, rtol=1e-4, atol=1e-5, msg=name)
            torch.testing.assert_close(result.mean_grad[i], used / twin.steps(i), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("anchor", ["start", "elsewhere"])
@pytest.mark.parametrize("mean_grad", [False, True])
@pytest.mark.parametrize("hidden", [200, 4])  # in factors, and fused steps
@pytest.mark.parametrize("engine", ["stacked", "loop"])
def test_a_pull_at_the_local_model_is_followed_in_every_way(
    engine: str, hidden: int, mean_grad: bool, anchor: str
) -> None:
    model = partial(mlp, hidden=[hidden])
    task, twin = digits_task(model, COUNTS, engine), images(model, COUNTS, 6)[1]
    c_i = 0.01 * torch.randn(4, len(task.x0), generator=torch.Generator().manual_seed(0))
    x, mu, job = task.x0, 1.5, 2
    w = x if anchor == "start" else 0.9 * x
    u = 0.5 * GRADIENT - c_i + mu * (MODEL - w)
    local = local_sgd(task, 0.1, epochs=1, steps=None, batch_size=6)
    result = local(cohort(task, [0, 1, 2, 3], [job] * 4), x, u, mean_grad=mean_grad)
    for i in range(4):
        y, used = x.clone(), torch.zeros_like(x)
        for k in range(twin.steps(i)):
            g = twin.gradient(i, y, job, k)
            used, y = used + g, y - 0.1 * (0.5 * g - c_i[i] + mu * (y - w))
        torch.testing.assert_close(result.delta.dense()[i], x - y, rtol=1e-4, atol=1e-6)
        if result.mean_grad is not None:
            torch.testing.assert_close(result.mean_grad[i], used / max(twin.steps(i), 1), rtol=1e-4, atol=1e-5)
    assert (result.mean_grad is not None) == mean_grad


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "sgd", "lr": 0.1, "schedule": {"name": "exponential", "gamma": 0.5, "unit": "steps"}},
        {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        {"name": "sgd", "lr": 0.1, "clip": {"global": 0.5}},
        {"name": "adam", "lr": 0.05},
    ],
    ids=["schedule", "momentum", "clip", "adam"],
)
def test_a_rule_takes_a_pull_as_part_of_the_gradient(rule: dict[str, Any]) -> None:
    task = drawn(2, 3)
    u = GRADIENT + 2.0 * (MODEL - task.x0)
    result = local_sgd(task, steps=5, optimizer=rule)(cohort(task, [0, 1]), task.x0, u)
    for i in range(2):
        y = task.x0.clone().requires_grad_()
        settings = {k: v for k, v in rule.items() if k not in ("name", "schedule", "clip")}
        kind = torch.optim.Adam if rule["name"] == "adam" else torch.optim.SGD
        torch_rule: torch.optim.Optimizer = kind([y], **settings)
        for k in range(5):
            y.grad = task.a[i] * (y.detach() - task.b[i]) + 2.0 * (y.detach() - task.x0)
            if "clip" in rule:
                y.grad *= (0.5 / y.grad.norm()).clamp(max=1)
            if "schedule" in rule:
                torch_rule.param_groups[0]["lr"] = 0.1 * 0.5**k
            torch_rule.step()
        torch.testing.assert_close(result.delta.dense()[i], task.x0 - y.detach(), rtol=1e-6, atol=1e-8)


def test_clients_may_start_from_models_of_their_own() -> None:
    task = drawn(3, 2)
    x = torch.arange(6, dtype=torch.float64).view(3, 2)
    result = local_sgd(task, 0.1, steps=4)(cohort(task, [0, 1, 2]), x)
    torch.testing.assert_close(result.delta.dense(), (1 - (1 - 0.1 * task.a) ** 4) * (x - task.b))


def test_the_model_received_is_left_as_it_is() -> None:
    task = drawn(3, 2)
    x = torch.ones(2, dtype=torch.float64)
    local_sgd(task)(cohort(task, [0, 1, 2]), x)
    assert x.tolist() == [1, 1]


@pytest.mark.parametrize("rule", [{"name": "sgd", "lr": 0.1, "momentum": 0.9}, {"name": "adam", "lr": 0.05}])
def test_other_rules_step_as_torch_does_and_add_up_raw_gradients(rule: dict[str, Any]) -> None:
    task = drawn(2, 3)
    clients = cohort(task, [0, 1])
    result = local_sgd(task, steps=5, optimizer=rule)(clients, task.x0, 2.0 * GRADIENT, mean_grad=True)
    for i in range(2):
        y = task.x0.clone().requires_grad_()
        kind = torch.optim.Adam if rule["name"] == "adam" else torch.optim.SGD
        torch_rule = kind([y], **{k: v for k, v in rule.items() if k != "name"})
        used = torch.zeros(3, dtype=torch.float64)
        for _ in range(5):
            raw = task.a[i] * (y.detach() - task.b[i])
            used += raw
            y.grad = 2.0 * raw
            torch_rule.step()
        torch.testing.assert_close(result.delta.dense()[i], task.x0 - y.detach(), rtol=1e-6, atol=1e-8)
        assert result.mean_grad is not None
        torch.testing.assert_close(result.mean_grad[i], used / 5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unit", ["rounds", "steps", "fraction"])
@pytest.mark.parametrize("momentum", [0.0, 1e-12])  # the plain path, and that of any rule
def test_schedules_count_rounds_local_steps_or_the_share_of_the_run(unit: str, momentum: float) -> None:
    task = quadratic([1.0] * 3, [0.0] * 3, 1.0)
    schedule = {"name": "exponential", "gamma": 0.5 if unit != "fraction" else 0.99, "unit": unit}
    rule = {"name": "sgd", "lr": 0.1, "schedule": schedule} | ({"momentum": momentum} if momentum else {})
    local = local_sgd(task, rounds=10, steps=2, optimizer=rule)
    jobs, rounds = [0, 1, 3], [0, 2, 5]
    result = local(cohort(task, [0, 1, 2], jobs, rounds), task.x0)
    expected = []
    for job, r in zip(jobs, rounds, strict=True):
        y = 1.0
        for k in range(2):
            factor = {"rounds": 0.5**r, "steps": 0.5 ** (2 * job + k), "fraction": 0.99 ** (1000 * r / 10)}[unit]
            y -= 0.1 * factor * y
        expected.append(1 - y)
    assert result.delta.dense()[:, 0].tolist() == pytest.approx(expected, rel=1e-5)


def test_state_kept_by_clients_makes_rounds_one_long_run() -> None:
    # one client, averaged with nobody: two rounds of three steps are six steps of momentum
    task = quadratic([1.0], [0.0], 1.0)
    for scope, restart in (("client", False), ("round", True)):
        rule = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "state_scope": scope}
        x = Play.start(task, FedAvg(local=local_sgd(task, steps=3, optimizer=rule))).path(2)[-1]
        y, v = 1.0, 0.0
        for k in range(6):
            v = (0.0 if restart and k == 3 else v) * 0.9 + y
            y -= 0.1 * v
        assert float(x) == pytest.approx(y, rel=1e-6), scope


def test_a_client_takes_up_its_own_state_and_a_new_one_starts_afresh() -> None:
    task = quadratic([1.0, 1.0], [0.0, 0.0], 1.0)
    rule = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "state_scope": "client"}
    local = local_sgd(task, steps=1, optimizer=rule)
    play = Play.start(task, FedAvg(local=local))
    first = play.fleet.ask(torch.tensor([0]), play.strategy.local_update, x=task.x0)["delta"]
    both = play.fleet.ask(torch.tensor([0, 1]), play.strategy.local_update, x=task.x0)["delta"]
    assert float(first) == pytest.approx(0.1)
    assert both[:, 0].tolist() == pytest.approx([0.1 * 1.9, 0.1])


def test_buffers_of_a_module_travel_with_the_model() -> None:
    task = digits_task(resnet_bn, [12, 8])
    local = local_sgd(task, 0.05, epochs=1, steps=None, batch_size=4)
    play = Play.start(task, FedAvg(local=local))
    x = play.path(2)[-1]
    n = task.layout.num_trainable
    assert bool((x[n:] != task.x0[n:]).any()) and bool(x.isfinite().all())


def test_the_loss_logged_is_the_mean_over_a_clients_steps() -> None:
    task = quadratic([2.0], [0.0], 1.0)
    clients = cohort(task, [0])
    local_sgd(task, 0.25, steps=3)(clients, task.x0)  # halves x every step
    assert float(clients.metrics["train_loss"]) == pytest.approx((1 + 0.25 + 0.0625) / 3)


def test_a_rate_that_is_not_one_number_cannot_be_divided_by() -> None:
    task = drawn(2, 3)
    rule = {"name": "sgd", "lr": 0.1, "schedule": {"name": "step"}}
    with pytest.raises(ValueError, match="give one number and no schedule"):
        _ = local_sgd(task, optimizer=rule).lr
    assert local_sgd(task, 0.3).lr == 0.3


def test_the_cost_of_a_job_is_its_local_steps() -> None:
    rule = build({"name": "sgd", "lr": 0.1}, drawn(1, 1).layout)
    local = LocalTraining(optimizer=rule, schedule=Schedule(epochs=3, batch_size=4))
    counts: Tensor = torch.tensor([9, 4, 1, 0])
    assert local.cost.steps_of(counts).tolist() == [9, 3, 3, 0]


@pytest.mark.parametrize("engine", ["stacked", "loop"])
@pytest.mark.parametrize("own_models", [False, True])
def test_the_change_follows_from_the_mean_gradient_and_folds_as_it_forms(engine: str, own_models: bool) -> None:
    task = digits_task(mlp, COUNTS, engine)
    clients = cohort(task, [0, 1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    c_i = 0.01 * torch.randn(4, len(task.x0), generator=generator)
    x = task.x0 + 0.01 * torch.randn(4, len(task.x0), generator=generator) if own_models else task.x0
    u = 0.5 * (GRADIENT - c_i) + 0.2 * task.x0
    run = local_sgd(task, epochs=1, steps=None, batch_size=6)(clients, x, u, mean_grad=True)
    mean, steps, change = run.mean_grad, run.steps[:, None], run.delta.dense()
    assert mean is not None
    torch.testing.assert_close(change, 0.1 * steps * (0.5 * (mean - c_i) + 0.2 * task.x0))
    assert change[3].abs().max() == 0 and mean[3].abs().max() == 0, "no data, no steps"
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(run.delta.weighted_sum(weights), weights.float() @ change)
