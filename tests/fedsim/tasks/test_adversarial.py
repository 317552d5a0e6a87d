"""Adversarial training: the operator by autograd, attacks on linear models in closed form, who has which entries."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

import fedsim
from fedsim.compose import compose
from fedsim.config import ConfigError, Given
from fedsim.data.arrays import from_arrays
from fedsim.history import History
from fedsim.prox import Ball, Rows
from fedsim.runs import run
from fedsim.task import Schedule
from fedsim.tasks.adversarial import NAME, AdversarialTask
from tests.build import streams, task_and_pool

EXTRAGRADIENT = {"name": "extragradient", "lr": 0.1}
RAW: dict[str, Any] = {
    "rounds": 2,
    "task": {"name": "adversarial", "model": {"name": "mlp", "hidden": [5]}},
    "partition": "iid",
    "clients": {"count": 10},
    "strategy": EXTRAGRADIENT,
}


def given(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """An entry for data of one's own."""
    data = from_arrays(x.astype(np.float32), y)
    return {"name": Given.object(data, lambda: data)}


def two_classes(spread: float, n: int = 40) -> dict[str, Any]:
    """Points around (2, 0) and (-2, 0)."""
    y = np.arange(n) % 2
    centres = np.array([[2.0, 0.0], [-2.0, 0.0]])
    return given(centres[y] + spread * np.random.default_rng(0).normal(size=(n, 2)), y)


def raw(strategy: dict[str, Any] = EXTRAGRADIENT, **task: Any) -> dict[str, Any]:
    found = {**RAW, "strategy": strategy, "task": {**RAW["task"], **task}}
    if "lr" not in strategy:
        found["local"] = {"steps": 2, "batch_size": 4, "optimizer": {"name": "sgd", "lr": 0.1}}
    return found


def made(**task: Any) -> AbstractContextManager[tuple[AdversarialTask, Any]]:
    """(the task of a file, a pool to evaluate on)."""
    return task_and_pool(raw(**task), AdversarialTask)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_the_operator_is_down_in_the_weights_and_up_in_the_perturbations(rho: float) -> None:
    with made(rho=rho) as (task, _):
        ids = torch.tensor([3, 0, 7])
        x = 0.3 * torch.randn(3, task.layout.size, generator=torch.Generator().manual_seed(1))
        batch = task.batches(ids, streams(ids), Schedule(steps=1, epochs=None, batch_size=4))[0]
        f, loss = task.field(x, batch)
        for c in range(3):
            own = {k: v.double().requires_grad_() for k, v in task.layout.views(x[c]).items()}
            inputs, labels = batch.inputs["inputs"][c].double(), batch.inputs["labels"][c]
            moved = (inputs.flatten(1) + own[NAME][labels]) @ own["model.1.weight"].T + own["model.1.bias"]
            logits = moved.relu() @ own["model.3.weight"].T + own["model.3.bias"]
            value = F.cross_entropy(logits, labels) - rho * own[NAME].square().sum()
            assert float(loss[c]) == pytest.approx(float(value.detach()), abs=1e-5)
            for name, g in zip(own, torch.autograd.grad(value, list(own.values())), strict=True):
                got = task.layout.views(f[c])[name]
                torch.testing.assert_close(got.double(), -g if name == NAME else g, rtol=0, atol=2e-6)


def test_on_a_linear_model_of_two_classes_the_attack_is_the_worst_of_every_sample() -> None:
    with made(dataset=two_classes(1.5, n=200), model="logistic", epsilon=1.3) as (task, pool):
        x = torch.randn(task.layout.size, generator=torch.Generator().manual_seed(2))
        own = task.layout.views(x)
        w = (own["model.1.weight"][1] - own["model.1.weight"][0]).double()
        bias = (own["model.1.bias"][1] - own["model.1.bias"][0]).double()
        expected = torch.stack([w, -w]) * 1.3 / w.norm()  # class 0 goes along w, class 1 against it
        torch.testing.assert_close(task.attack(x, pool).double(), expected, rtol=0, atol=1e-5)
        signs = 2 * task.data.test_targets.double() - 1
        margin = signs * (task.data.test_inputs["inputs"].double() @ w + bias)
        found = task.evaluate(x, pool)
        assert found["test_accuracy"] == pytest.approx(float((margin > 0).double().mean()))
        assert found["test_adversarial_accuracy"] == pytest.approx(float((margin > 1.3 * w.norm()).double().mean()))


def test_with_a_price_the_attack_is_where_it_no_longer_pays() -> None:
    with made(epsilon=None, rho=0.8) as (task, pool):
        x = task.init(0) + 0.2 * torch.randn(task.layout.size, generator=torch.Generator().manual_seed(3))
        r = task.attack(x, pool)
        loss, slope = task._held_out_gradient(x, r, pool)
        start, _ = task._held_out_gradient(x, torch.zeros_like(r), pool)
        assert loss - 0.8 * float(r.square().sum()) > start
        torch.testing.assert_close(r, slope / 1.6, rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm, expected", [("l2", [[0.6, 0.8], [0.1, 0.0]]), ("linf", [[1.0, 1.0], [0.1, 0.0]])])
def test_the_set_is_one_for_each_class(norm: str, expected: list[list[float]]) -> None:
    with made(dataset=two_classes(0.3), norm=norm) as (task, _):
        z = torch.zeros(task.layout.size)
        task.layout.views(z)[NAME][:] = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
        assert task.layout.views(task.prox(z, 1.0))[NAME].tolist() == [pytest.approx(row) for row in expected]


def test_rows_are_each_projected_by_themselves() -> None:
    assert Rows(Ball(radius=5.0), 2)(torch.tensor([6.0, 8.0, 1.0, 0.0]), 1.0).tolist() == [3.0, 4.0, 1.0, 0.0]


def test_on_a_linear_model_of_two_classes_training_minimises_the_worst_loss() -> None:
    # the second number tells the classes apart for sure, but by less than it may be moved
    rng, y = np.random.default_rng(0), np.arange(100) % 2
    sign = 2 * y - 1
    x = np.stack([1.2 * sign + rng.normal(size=100), 0.2 * sign], 1)

    def worst(w: np.ndarray) -> float:
        margin = sign * (x @ w[:2] + w[2]) - 0.4 * np.linalg.norm(w[:2])
        return float(np.logaddexp(0, -margin).mean())

    found = {}
    for epsilon in (1e-9, 0.4):
        file = raw({"name": "extragradient", "lr": 1.0}, dataset=given(x, y), model="logistic", epsilon=epsilon)
        model = run({**file, "evaluate": {"every": 60}}, rounds=60).model
        weight, bias = (model.get_parameter(f"model.1.{k}").detach().numpy() for k in ("weight", "bias"))
        found[epsilon] = worst(np.append(weight[1] - weight[0], bias[1] - bias[0]))
    least = minimize(worst, np.ones(3)).fun  # over all rows, of which clients have 80
    assert found[0.4] < least + 0.002 and found[1e-9] > least + 0.015


def test_perturbations_stay_with_their_clients_where_a_strategy_keeps_them_at_home() -> None:
    strategy = {"name": "fedper", "personal": ["perturbation.*"]}
    file = {**raw(strategy, epsilon=None, rho=0.5), "data": {"client_test": 0.2}}
    with fedsim.simulate(file) as simulation:
        rows = list(simulation.rounds())
        own = simulation._made.memory.of(torch.arange(10))["personal"]
        assert own.shape == (10, 640) and len(own.unique(dim=0)) == 10
        assert not bool(simulation.model.get_parameter(NAME).any())  # the server's stays where it was
        assert rows[-1]["bits_up"] == 2 * 10 * 32 * (len(simulation.state.x) - 640)


@pytest.mark.parametrize(
    "task, message",
    [
        ({"epsilon": None}, "task: nothing bounds the perturbation; set task.epsilon, or task.rho above 0"),
        ({"epsilon": -1.0}, "task: needs epsilon > 0 or null and rho >= 0, got -1.0"),
        ({"norm": "l1"}, "task.norm"),
        ({"dataset": "shakespeare"}, "task.dataset: a perturbation needs samples that are one tensor of numbers"),
    ],
)
def test_what_does_not_fit_is_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(raw(**task), "x.yaml")


def test_strategies_without_a_prox_refuse_the_bound_and_optimizers_of_losses_the_game() -> None:
    with pytest.raises(ConfigError, match="fedavg has no prox .*task.epsilon: null"):
        compose(raw({"name": "fedavg"}), "x.yaml")
    priced = raw({"name": "fedavg"}, epsilon=None, rho=0.5)
    priced["local"] = {"optimizer": {"name": "mezo", "lr": 0.1}}
    with pytest.raises(ConfigError, match="local.optimizer.*a saddle point is not minimised"):
        compose(priced, "x.yaml")


@pytest.mark.pictures
def test_a_run_shows_its_perturbations_and_its_model_is_read_back(tmp_path: Any) -> None:
    history = run({**raw(), "evaluate": {"every": 1}}, out=tmp_path / "run")
    assert set(history.keys()) >= {"test_accuracy", "test_adversarial_accuracy", "client_accuracy_mean"}
    with np.load(tmp_path / "run" / "pictures.npz") as stored:
        assert [stored[name].shape for name in stored.files] == [(1, 10, 8, 8, 1), (2, 10, 8, 8, 1)]
    assert "Perturbation of each class" in (tmp_path / "run" / "report.html").read_text()
    again = History.load(tmp_path / "run").model
    assert isinstance(again.model, nn.Module)
    for name, value in history.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
