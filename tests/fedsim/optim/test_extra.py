"""Sophia against its formula, pytorch_optimizer and its limits; settings that say where a gradient comes from."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.optim import build, torch_optimizer
from fedsim.optim.table import RULES
from fedsim.params import Layout
from tests.fedsim.optim.oracles import LAYOUT, problem

G = {"name": "sophia_g", "lr": 0.1, "weight_decay": 0.1, "decay_vectors": True, "every": 3}
H = {"name": "sophia_h", "lr": 0.1, "weight_decay": 0.1, "decay_vectors": True, "every": 3}


def run(spec: dict[str, Any], x: Tensor, grads: Tensor, extra: Tensor, batch: Tensor | None = None) -> Tensor:
    """The stack with the t-th extra estimate supplied wherever one is wanted."""
    optimizer, y = build(spec, LAYOUT), x.clone()
    state = optimizer.init(y)
    for g, estimate in zip(grads, extra, strict=True):
        aux = {}
        wanted = optimizer.wanted(state)
        if "sampled_grad" in wanted:
            aux = {"sampled_grad": estimate, "batch_size": torch.full((len(x), 1), 5.0) if batch is None else batch}
        if "hvp" in wanted:
            aux = {"hvp": estimate}
        optimizer.step_(y, g, state, aux=aux)
    return y


def test_sophia_g_equals_its_formula_entry_by_entry() -> None:
    x, grads = problem(8)
    sampled = 0.3 * problem(8, seed=1)[1]
    ours = run(G, x, grads, sampled)
    y, m, h = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for t, (g, s) in enumerate(zip(grads, sampled, strict=True)):
        if t % 3 == 0:
            h = 0.99 * h + 0.01 * s * s  # as the authors' file, which has the batch size in the step
        y = y * (1 - 0.1 * 0.1)
        m = 0.965 * m + 0.035 * g
        y = y - 0.1 * m.sign() * (m.abs() / (0.04 * 5 * h + 1e-15)).clamp(None, 1)
    assert torch.allclose(ours, y, rtol=0, atol=1e-14)


def test_batch_sizes_that_differ_between_clients_enter_the_curvature_when_it_is_refreshed() -> None:
    x, grads = problem(2)
    sampled = problem(2, seed=1)[1]
    sizes = torch.tensor([[1.0], [5.0], [20.0]], dtype=torch.float64)
    together = run(G, x, grads, sampled, sizes)
    for client in range(3):
        alone = run(G, x[[client]], grads[:, [client]], sampled[:, [client]], sizes[[client]])
        assert torch.allclose(together[[client]], alone, rtol=0, atol=1e-15)
    assert not torch.allclose(together, run(G, x, grads, sampled))


def test_without_curvature_sophia_g_is_the_sign_of_a_running_mean() -> None:
    x, grads = problem()
    ours = run({**G, "weight_decay": 0.0}, x, grads, 0 * grads)
    y, m = x.clone(), torch.zeros_like(x)
    for g in grads:
        m = 0.965 * m + 0.035 * g
        y = y - 0.1 * m.sign()
    assert torch.allclose(ours, y, rtol=0, atol=1e-14)


def test_with_much_curvature_sophia_g_is_the_mean_over_the_curvature() -> None:
    x, grads = problem(1)
    moved = x - run({**G, "weight_decay": 0.0}, x, grads, torch.full_like(grads, 1e3))
    assert torch.allclose(moved, 0.1 * 0.035 * grads[0] / (0.04 * 5 * 0.01 * 1e6), atol=1e-15)


def test_sophia_h_equals_pytorch_optimizer_with_the_same_diagonals() -> None:
    module = pytest.importorskip("pytorch_optimizer")
    x, grads = problem(8)
    diagonals = problem(8, seed=1)[1]  # of both signs
    ours = run({**H, "rho": 0.5}, x, grads, diagonals)
    for client in range(3):
        params = [nn.Parameter(v.clone()) for v in LAYOUT.views(x[client]).values()]
        theirs = module.SophiaH(params, lr=0.1, betas=(0.965, 0.99), weight_decay=0.1, p=0.5, update_period=10**9)
        for t, g in enumerate(grads):
            for p, v in zip(params, LAYOUT.views(g[client]).values(), strict=True):
                p.grad = v.clone()
            due = [v.clone() for v in LAYOUT.views(diagonals[t, client]).values()]
            if t == 0:  # its own estimate at step one would need a graph
                theirs.step(hessian=due)
            else:
                theirs.step(hessian=due if t % 3 == 0 else None)
        expected = torch.cat([p.detach().flatten() for p in params])
        assert torch.allclose(ours[client], expected, rtol=0, atol=1e-14)


def test_negative_curvature_makes_a_full_step() -> None:
    x, grads = problem(1)
    moved = x - run({**H, "weight_decay": 0.0, "rho": 0.01}, x, grads, torch.full_like(grads, -1.0))
    assert torch.allclose(moved, 0.1 * 0.01 * grads[0].sign(), atol=1e-15)


def test_extra_inputs_are_wanted_every_few_steps_of_each_client() -> None:
    x, grads = problem(7)
    optimizer = build(G, LAYOUT)
    state, both = optimizer.init(x), frozenset({"grad", "sampled_grad"})
    seen = []
    for g in grads:
        wanted = optimizer.wanted(state)
        seen.append(wanted == both)
        aux = {"sampled_grad": g, "batch_size": torch.ones(3, 1)} if wanted == both else {}
        optimizer.step_(x, g, state, aux=aux)
    assert seen == [True, False, False, True, False, False, True]
    assert optimizer.needs == both and build(H, LAYOUT).needs == {"grad", "hvp"}


def test_a_client_whose_turn_it_is_not_keeps_its_curvature() -> None:
    x, grads = problem(2)
    optimizer = build(G, LAYOUT)
    state = optimizer.init(x)
    aux = {"sampled_grad": grads[0], "batch_size": torch.ones(3, 1)}
    optimizer.step_(x[:1], grads[0, :1], state, aux={n: v[:1] for n, v in aux.items()})
    before = state.buffers["h"].clone()
    assert "sampled_grad" in optimizer.wanted(state)  # the others are at their first step
    optimizer.step_(x, grads[1], state, aux=aux)
    assert torch.equal(state.buffers["h"][0], before[0])
    assert torch.allclose(state.buffers["h"][1:], 0.01 * grads[0, 1:] ** 2)


def test_an_input_that_is_wanted_and_missing_is_an_error() -> None:
    x, grads = problem(1)
    optimizer = build(G, LAYOUT)
    with pytest.raises(ValueError, match=r"SophiaG needs aux\['sampled_grad'\] at this step"):
        optimizer.step_(x, grads[0], optimizer.init(x))
    with pytest.raises(ValueError, match="comes with batch_size"):
        optimizer.step_(x, grads[0], optimizer.init(x), aux={"sampled_grad": grads[0]})


@pytest.mark.parametrize("spec, name", [(G, "sampled_grad"), (H, "hvp")])
def test_an_estimate_that_is_not_finite_leaves_that_clients_curvature(spec: dict[str, Any], name: str) -> None:
    x, grads = problem(1)
    estimate = grads[0].clone()
    estimate[1, 3] = float("inf")
    optimizer = build(spec, LAYOUT)
    state = optimizer.init(x)
    sizes = {"batch_size": torch.ones(3, 1)} if name == "sampled_grad" else {}
    optimizer.step_(x, grads[0], state, aux={name: estimate, **sizes})
    assert not state.buffers["h"][1].any() and state.buffers["h"][0].any() and state.buffers["h"][2].any()
    assert torch.isfinite(x).all() and state.t.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "spec, needs",
    [
        ({"name": "sgd", "lr": 0.1, "zeroth_order": {}}, {"loss_eval"}),
        ({"name": "mezo", "lr": 0.1}, {"loss_eval"}),
        ({"name": "muon", "zeroth_order": {"directions": 2}}, {"loss_eval"}),
        ({"name": "adamw", "dp": {"clip": 1.0, "noise": 0.5}}, {"per_sample_norms"}),
        ({"name": "sophia_h", "dp": {"clip": 1.0}}, {"per_sample_norms", "hvp"}),
    ],
)
def test_where_the_gradient_comes_from_is_a_need_of_any_rule(spec: dict[str, Any], needs: set[str]) -> None:
    optimizer = build(spec, LAYOUT)
    state = optimizer.init(torch.zeros(2, LAYOUT.size))
    assert optimizer.needs == optimizer.wanted(state) == needs
    assert not optimizer.is_plain_sgd


@pytest.mark.parametrize("more", [{"zeroth_order": {}}, {"dp": {"clip": 1.0, "noise": 1.0}}])
def test_an_ordinary_gradient_does_not_pass_for_one_from_elsewhere(more: dict[str, Any]) -> None:
    x, grads = problem(1)
    optimizer = build({"name": "sgd", "lr": 0.1, **more}, LAYOUT)
    with pytest.raises(ValueError, match="take gradient and aux from needs.supply"):
        optimizer.step_(x, grads[0], optimizer.init(x))


def test_the_table_says_what_mezo_needs() -> None:
    assert RULES["mezo"].needs == {"loss_eval"} and RULES["sophia_g"].needs == {"grad", "sampled_grad"}


@pytest.mark.parametrize("spec", [{"name": "mezo", "lr": 0.1}, {"name": "sgd", "lr": 0.1, "dp": {"clip": 1.0}}, G, H])
def test_a_torch_optimizer_has_only_gradients(spec: dict[str, Any]) -> None:
    spec = copy.deepcopy(spec)
    with pytest.raises(ValueError, match="the rule needs .*, not only a gradient"):
        torch_optimizer(spec.pop("name"), [nn.Parameter(torch.zeros(2))], **spec)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"zeroth_order": {"eps": 0.0}}, "zeroth_order.eps: must lie in"),
        ({"zeroth_order": {"directions": 0}}, "zeroth_order.directions: must lie in"),
        ({"zeroth_order": {"direction": 1}}, "zeroth_order.direction: unknown key; did you mean 'directions'"),
        ({"dp": {"clip": 0.0}}, "optimizer.dp: clip must be positive"),
        ({"dp": {"clip": "1"}}, "optimizer.dp.clip: expected a number or"),
        ({"dp": {"clip": 1.0, "noise": -1.0}}, r"dp.noise: must lie in \[0, inf\)"),
        ({"dp": {"clip": float("inf"), "noise": 1.0}}, "noise is relative to clip, which is infinite"),
        ({"dp": {"clip": 1.0, "batch_size": 0.0}}, "optimizer.dp: batch_size must be positive"),
        ({"dp": {"clip": {"matrix": 1.0}}}, "clip has no bound for b"),
        ({"dp": {"clip": {"matrix": 1.0, "vectr": 2.0}}}, "unknown role or tensor 'vectr'; did you mean 'vector'"),
        ({"dp": {"clip": 1.0}, "zeroth_order": {}}, "both say where the gradient comes from"),
    ],
)
def test_a_wrong_setting_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"name": "sgd", "lr": 0.1, **more}, Layout.of({"w": (2, 3), "b": (2,)}))


def test_a_tensors_own_bound_counts_more_than_its_roles() -> None:
    dp = build({"name": "sgd", "lr": 1.0, "dp": {"clip": {"matrix": 2.0, "b": 3.0, "v": 5.0}}}, LAYOUT).settings.dp
    assert dp is not None and dp.bounds(LAYOUT) == (2.0, 3.0, 5.0)
    assert np.isclose(sum(b**2 for b in dp.bounds(LAYOUT)), 38)
