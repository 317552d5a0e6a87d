"""torch.optim classes by import path step every client as they would step it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedsim.config import ConfigError
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.params import Layout
from fedsim.runs import run

LAYOUT = Layout.of({"w": (3, 2), "b": (3,)})


def test_each_client_steps_as_torch_would_alone() -> None:
    optimizer = ForeignOptimizer(torch.optim.Adam, {"lr": 0.1}, LAYOUT)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, LAYOUT.size, generator=generator)
    alone = [row.clone().requires_grad_() for row in x]
    theirs = [torch.optim.Adam([p], lr=0.1) for p in alone]
    state = optimizer.init(x)
    for k in (4, 4, 2):
        grad = torch.randn(k, LAYOUT.size, generator=generator)
        optimizer.step_(x[:k], grad, state)
        for i in range(k):
            alone[i].grad = grad[i].clone()
            theirs[i].step()
    torch.testing.assert_close(x, torch.stack([p.detach() for p in alone]), rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_not_finite_skips_its_client_alone() -> None:
    optimizer = ForeignOptimizer(torch.optim.SGD, {"lr": 1.0}, LAYOUT)
    x = torch.zeros(2, LAYOUT.size)
    state = optimizer.init(x)
    grad = torch.ones(2, LAYOUT.size)
    grad[0, 3] = torch.nan
    optimizer.step_(x, grad, state)
    assert state.skipped.tolist() == [1, 0]
    assert x[0].eq(0).all() and x[1].eq(-1).all()


def test_whoever_does_not_want_to_wait_is_told_afterwards_that_a_gradient_was_not_finite() -> None:
    optimizer = ForeignOptimizer(torch.optim.SGD, {"lr": 1.0}, LAYOUT)
    x, doubt = torch.zeros(2, LAYOUT.size), torch.zeros(())
    state, grad = optimizer.init(x), torch.ones(2, LAYOUT.size)
    optimizer.step_(x, grad, state, doubt=doubt)
    assert doubt.isfinite()
    grad[0, 3] = torch.inf
    optimizer.step_(x, grad, state, doubt=doubt)
    assert not doubt.isfinite()


def test_it_is_named_by_import_path_in_an_experiment() -> None:
    config = {
        "rounds": 3,
        "task": {"name": "quadratic", "a": [1, 3], "b": [0, 1], "x0": 2},
        "local": {"steps": 4, "batch_size": "full", "optimizer": {"name": "torch.optim:SGD", "lr": 0.1}},
        "evaluate": {"every": 1},
    }
    with pytest.warns(UserWarning, match="not batched"):
        foreign = run(config)
    own = run(config, **{"local.optimizer": {"name": "sgd", "lr": 0.1}})
    assert foreign.last("x") == pytest.approx(own.last("x"), abs=1e-6)


def normed(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A classifier with running statistics."""
    width = int(torch.Size(input_shape).numel())
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(width), nn.Linear(width, num_classes))


def test_buffers_follow_the_clients_whatever_the_servers_rate() -> None:
    config: dict[str, Any] = {
        "rounds": 2,
        "task": {"name": "classification", "dataset": "digits", "model": {"name": f"{__name__}:normed"}},
        "clients": {"count": 4},
        "strategy": {"name": "fedavg", "cohort_size": 4, "server_lr": 0.5},
        "evaluate": {"every": 1},
    }
    with pytest.warns(UserWarning, match="not batched"):
        foreign = run(config, **{"local.optimizer": {"name": "torch.optim:SGD", "lr": 0.1}})
    own = run(config, **{"local.optimizer": {"name": "sgd", "lr": 0.1}})
    assert foreign.last("test_loss") == pytest.approx(own.last("test_loss"), rel=1e-5)


def test_one_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"local\.optimizer: .*LBFGS evaluates the loss within a step"):
        run({"local": {"optimizer": {"name": "torch.optim:LBFGS", "lr": 0.1}}})


def test_the_server_takes_rules_of_the_table_only() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.server_optimizer: import paths are for local optimizers"):
        run({"strategy": {"name": "fedavg", "server_optimizer": {"name": "torch.optim:SGD", "lr": 0.1}}})


def test_an_import_path_with_a_dot_for_the_colon_is_put_right() -> None:
    with pytest.raises(ConfigError, match=r"unknown name 'torch.optim.SGD'; .* is written 'torch.optim:SGD'"):
        run({"local": {"optimizer": {"name": "torch.optim.SGD", "lr": 0.1}}})


def test_wrong_arguments_are_one_clear_message() -> None:
    with pytest.raises(ConfigError, match=r"local\.optimizer: .*SGD can't be made with"):
        run({"local": {"optimizer": {"name": "torch.optim:SGD", "rate": 0.1}}})
