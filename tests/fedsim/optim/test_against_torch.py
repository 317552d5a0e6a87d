"""Rules that torch has, against torch.optim run client by client on the same gradients, in float64."""

import pytest
import torch
import torch.optim as optim

from fedsim.params import Layout
from tests.fedsim.optim.oracles import client_runs, error, problem, stack_run

WD = {"weight_decay": 0.1, "decay_vectors": True}
CASES = {
    "sgd": (lambda p: optim.SGD(p, 0.1), {"name": "sgd", "lr": 0.1}),
    "sgd l2": (lambda p: optim.SGD(p, 0.1, weight_decay=0.1), {"name": "sgd", "lr": 0.1, **WD}),
    "momentum": (
        lambda p: optim.SGD(p, 0.1, 0.9, dampening=0.3, weight_decay=0.1),
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.3, **WD},
    ),
    "nesterov": (
        lambda p: optim.SGD(p, 0.1, 0.9, nesterov=True),
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    "adam l2": (lambda p: optim.Adam(p, 0.1, weight_decay=0.1), {"name": "adam", "lr": 0.1, **WD}),
    "amsgrad": (lambda p: optim.Adam(p, 0.1, amsgrad=True), {"name": "amsgrad", "lr": 0.1}),
    "adamw": (lambda p: optim.AdamW(p, 0.1, weight_decay=0.1), {"name": "adamw", "lr": 0.1, **WD}),
    "adagrad": (
        lambda p: optim.Adagrad(p, 0.1, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.2),
        {"name": "adagrad", "lr": 0.1, "lr_decay": 0.1, "init": 0.2, **WD},
    ),
    "rmsprop": (lambda p: optim.RMSprop(p, 0.1), {"name": "rmsprop", "lr": 0.1}),
    "rmsprop centered": (
        lambda p: optim.RMSprop(p, 0.01, momentum=0.5, centered=True, alpha=0.9),
        {"name": "rmsprop", "lr": 0.01, "momentum": 0.5, "centered": True, "alpha": 0.9},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_stack_equals_torch_client_by_client(case: str, backend: str) -> None:
    make, spec = CASES[case]
    assert error(make, {**spec, "backend": backend}) < 3e-15


def test_fused_adamw_on_a_stack_is_torchs_own_kernel_bit_for_bit() -> None:
    layout = Layout.of({"w": (8, 16)})
    x, grads = (t.float() for t in problem(layout=layout))
    ours = stack_run({"name": "adamw", "lr": 0.1, "backend": "fused"}, x, grads, layout)
    assert torch.equal(ours, client_runs(lambda p: optim.AdamW(p, 0.1, fused=True), x, grads, layout))


def test_global_clipping_equals_clip_grad_norm_per_client() -> None:
    x, grads = problem()

    class Clipped:
        def __init__(self, params: list[torch.nn.Parameter]) -> None:
            self.params, self.inner = params, optim.SGD(params, 0.1, 0.9)

        def step(self) -> None:
            torch.nn.utils.clip_grad_norm_(self.params, 5.0)
            self.inner.step()

    ours = stack_run({"name": "sgd", "lr": 0.1, "momentum": 0.9, "clip": {"global": 5.0}}, x, grads)
    assert (ours - client_runs(Clipped, x, grads)).abs().max() < 2e-15


def test_controls_that_must_differ_do() -> None:
    x, grads = problem()
    right = client_runs(lambda p: optim.AdamW(p, 1e-3, weight_decay=0.01, eps=1e-3), x, grads)
    base = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "decay_vectors": True, "eps": 1e-3}
    assert (stack_run(base, x, grads) - right).abs().max() < 1e-15
    assert (stack_run({**base, "decay": "decoupled_after"}, x, grads) - right).abs().max() > 1e-9
    assert (stack_run({**base, "eps_mode": "raw"}, x, grads) - right).abs().max() > 1e-5
    alone = stack_run({"name": "sgd", "lr": 0.1, "clip": {"global": 5.0}}, x, grads)
    norm = torch.linalg.vector_norm(grads, dim=(1, 2), keepdim=True)
    together = x - 0.1 * (grads * (5.0 / norm).clamp(max=1)).sum(0)
    assert (alone - together).abs().max() > 1e-2


def test_sgd_with_ema_momentum_is_sgd_at_a_smaller_rate() -> None:
    x, grads = problem()
    ours = stack_run({"name": "sgd", "lr": 0.1, "momentum": 0.9, "ema": True}, x, grads)
    theirs = stack_run({"name": "sgd", "lr": 0.01, "momentum": 0.9}, x, grads)
    assert (ours - theirs).abs().max() < 1e-15
