"""Rules against other libraries' implementations, client by client on the same gradients, in float64.

The libraries are needed here only; a case is skipped where its library is not installed.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from fedsim.params import Layout
from tests.fedsim.optim.oracles import LAYOUT, client_runs, error, problem, stack_run

WD = {"weight_decay": 0.1, "decay_vectors": True}


def po(name: str, params: list[nn.Parameter], **hyper: Any) -> Any:
    return getattr(pytest.importorskip("pytorch_optimizer"), name)(params, **hyper)


TORCH = {
    "nadam": (lambda p: optim.NAdam(p, 0.01, weight_decay=0.1), {"name": "nadam", "lr": 0.01, **WD}),
    "radam, short and long": (lambda p: optim.RAdam(p, 0.01), {"name": "radam", "lr": 0.01}),
    "radam, long at once": (
        lambda p: optim.RAdam(p, 0.01, betas=(0.8, 0.9)),
        {"name": "radam", "lr": 0.01, "beta1": 0.8, "beta2": 0.9},
    ),
    "adafactor": (lambda p: optim.Adafactor(p, 0.1, weight_decay=0.1), {"name": "adafactor", "lr": 0.1, **WD}),
}

PO = {
    "yogi": (
        lambda p: po("Yogi", p, lr=0.01, initial_accumulator=0.0, weight_decay=0.1),
        {"name": "yogi", "init": 0.0, "decay": "decoupled", **WD},
    ),
    "adabelief": (
        lambda p: po("AdaBelief", p, lr=0.01, eps=1e-16, weight_decay=0.1),
        {"name": "adabelief", "lr": 0.01, **WD},
    ),
    "adabelief rectified": (
        lambda p: po("AdaBelief", p, lr=0.01, betas=(0.9, 0.95), eps=1e-16, rectify=True, degenerated_to_sgd=True),
        {"name": "adabelief", "lr": 0.01, "beta2": 0.95, "eps": 1e-16, "rectify": True},
    ),
    "adan": (lambda p: po("Adan", p, lr=0.01, weight_decay=0.1), {"name": "adan", "lr": 0.01, **WD}),
    "adan no_prox": (
        lambda p: po("Adan", p, lr=0.01, weight_decay=0.1, weight_decouple=True),
        {"name": "adan", "lr": 0.01, "decay": "decoupled", **WD},
    ),
    "lion": (lambda p: po("Lion", p, lr=0.01, weight_decay=0.1), {"name": "lion", "lr": 0.01, **WD}),
    "sgdp": (
        lambda p: po("SGDP", p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1, delta=4.0),
        {"name": "sgdp", "lr": 0.1, "momentum": 0.9, "dampening": 0.2, "delta": 4.0, **WD},
    ),
    "sgdp nesterov": (
        lambda p: po("SGDP", p, lr=0.1, momentum=0.9, nesterov=True),
        {"name": "sgdp", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    "stable_spam": (
        lambda p: po("StableSPAM", p, lr=0.01, weight_decay=0.1, update_proj_gap=3, theta=0.9),
        {"name": "stable_spam", "lr": 0.01, "interval": 3, "gamma3": 0.9, **WD},
    ),
}


@pytest.mark.parametrize("case", TORCH)
def test_a_stack_equals_torch(case: str) -> None:
    make, spec = TORCH[case]
    torch.set_default_dtype(torch.float64)  # torch keeps NAdam's running product in the default type
    try:
        assert error(make, spec, steps=12) < 5e-15
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", PO)
def test_a_stack_equals_pytorch_optimizer(case: str) -> None:
    make, spec = PO[case]
    assert error(make, spec, steps=8) < 5e-15


def test_diffgrad_equals_pytorch_optimizer_up_to_its_term_under_the_root() -> None:
    make = lambda p: po("DiffGrad", p, lr=0.01)  # noqa: E731
    assert error(make, {"name": "diffgrad", "lr": 0.01}) < 5e-9


def test_lars_equals_pytorch_optimizer() -> None:
    make = lambda p: po("LARS", p, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    assert error(make, {"name": "lars", "lr": 0.1, "weight_decay": 0.1}) < 5e-15


def test_perp_grad_equals_pytorch_optimizer() -> None:
    module = pytest.importorskip("pytorch_optimizer")
    layout = Layout.of({"w": (8, 16), "b": (8,)})
    make = lambda p: module.OrthoGrad(optim.SGD(p, lr=0.1))  # noqa: E731
    assert error(make, {"name": "sgd", "lr": 0.1, "perp_grad": True}, layout=layout) < 5e-15


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("SGDScheduleFree", {"name": "schedule_free_sgd", "lr": 0.1}),
        ("AdamWScheduleFree", {"name": "schedule_free_adamw", "lr": 0.01}),
    ],
)
def test_schedule_free_rules_equal_the_package_at_both_points(theirs: str, ours: dict[str, Any]) -> None:
    package = pytest.importorskip("schedulefree")
    x, grads = problem(steps=9)
    spec = {**ours, "beta": 0.8, "warmup": 4, "r": 0.5, "power": 1.5, **WD}
    common = {
        "lr": ours["lr"],
        "weight_decay": 0.1,
        "warmup_steps": 4,
        "r": 0.5,
        "weight_lr_power": 1.5,
        "foreach": False,
    }
    beta = {"momentum": 0.8} if theirs == "SGDScheduleFree" else {"betas": (0.8, 0.999)}
    made: list[Any] = []

    def make(params: list[nn.Parameter]) -> Any:
        made.append((getattr(package, theirs)(params, **common, **beta), params))
        made[-1][0].train()
        return made[-1][0]

    assert (stack_run(spec, x, grads) - client_runs(make, x, grads)).abs().max() < 5e-15
    for optimizer, _ in made:
        optimizer.eval()
    evaluated = torch.stack([torch.cat([p.detach().reshape(-1) for p in params]) for _, params in made])
    assert (stack_run(spec, x, grads, final=True) - evaluated).abs().max() < 5e-15


def optax_run(name: str, x: Tensor, grads: Tensor, **hyper: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
        jax.config.update("jax_enable_x64", True)
        rule = getattr(optax, name)(**hyper)
        rows = []
        for c in range(len(x)):
            params = {k: jax.numpy.asarray(v.numpy()) for k, v in LAYOUT.views(x[c]).items()}
            state = rule.init(params)
            for g in grads:
                tree = {k: jax.numpy.asarray(v.numpy()) for k, v in LAYOUT.views(g[c]).items()}
                updates, state = rule.update(tree, state, params)
                params = optax.apply_updates(params, updates)
            rows.append(_flat(params))
    return torch.stack(rows)


def _flat(params: dict[str, Any]) -> Tensor:
    return torch.cat([torch.tensor(params[k].tolist(), dtype=torch.float64).reshape(-1) for k in LAYOUT.names])


OPTAX = {
    "lamb": ({"learning_rate": 0.01, "weight_decay": 0.1}, {"name": "lamb", "lr": 0.01, "adapt_vectors": True, **WD}),
    "yogi": ({"learning_rate": 0.01}, {"name": "yogi"}),
    "lion": ({"learning_rate": 0.01, "weight_decay": 0.1}, {"name": "lion", "lr": 0.01, **WD}),
    "adabelief": (
        {"learning_rate": 0.01, "eps": 1e-6, "eps_root": 1e-6},
        {"name": "adabelief", "lr": 0.01, "eps": 1e-6},
    ),
    "adamw": ({"learning_rate": 0.01, "weight_decay": 0.1}, {"name": "adamw", "lr": 0.01, **WD}),
}


@pytest.mark.parametrize("name", OPTAX)
def test_a_stack_equals_optax(name: str) -> None:
    hyper, spec = OPTAX[name]
    x, grads = problem()
    assert (stack_run(spec, x, grads) - optax_run(name, x, grads, **hyper)).abs().max() < 5e-15


def test_pytorch_optimizers_spam_is_not_this_spam() -> None:
    x, grads = problem(steps=8)
    ours = stack_run({"name": "spam", "lr": 0.01, "interval": 3, "warmup": 4, "guard": 1}, x, grads)
    make = lambda p: po("SPAM", p, lr=0.01, update_proj_gap=3, warmup_epoch=4, grad_accu_steps=1)  # noqa: E731
    assert (ours - client_runs(make, x, grads)).abs().max() > 1e-4
