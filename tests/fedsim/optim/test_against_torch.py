"""Rules that torch has, against torch.optim run client by client on the same gradients, in float64."""

import pytest
import torch
import torch.optim as optim
from torch import nn

from fedsim.optim import build
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
    assert (stack_run(base, x, grads) - right).abs().max() < 1e-14
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


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_beside_torchs_kernel_spares_the_vectors_and_gives_the_bits_of_a_client_alone(name: str) -> None:
    layout = Layout.of({"w": (192, 100), "b": (192,), "v": (320, 20), "c": (320,)})  # whole vector registers
    generator = torch.Generator().manual_seed(0)
    x0, *grads = torch.randn(4, 8, layout.size, generator=generator).unbind(0)
    extra = {"momentum": 0.9, "decay": "decoupled"} if name == "sgd" else {}
    optimizer = build({"name": name, "lr": 0.1, "weight_decay": 0.3, "backend": "fused", **extra}, layout)
    together, alone = x0.clone(), x0.clone()
    state = optimizer.init(together)
    states = [optimizer.init(alone[i : i + 1]) for i in range(8)]
    for g in grads:
        optimizer.step_(together, g, state)
        for i in range(8):
            optimizer.step_(alone[i : i + 1], g[i : i + 1], states[i])
    assert torch.equal(together, alone)
    if name == "adamw":
        params = [nn.Parameter(v.clone()) for v in layout.views(x0[3]).values()]
        groups = [{"params": params[0::2], "weight_decay": 0.3}, {"params": params[1::2], "weight_decay": 0.0}]
        theirs = torch.optim.AdamW(groups, 0.1, fused=True)
        for g in grads:
            for p, v in zip(params, layout.views(g[3]).values(), strict=True):
                p.grad = v.clone()
            theirs.step()
        for p, v in zip(params, layout.views(together[3]).values(), strict=True):
            assert torch.allclose(p.detach(), v, rtol=1e-6, atol=1e-6)
