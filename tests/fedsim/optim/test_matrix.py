"""Muon and Hybrid-AuON against torch's Muon and against plain loops; how matrices are grouped."""

from __future__ import annotations

from math import cosh
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from fedsim.optim import build
from fedsim.optim.rules.matrix import NEWTON_SCHULZ, groups_of, newton_schulz
from fedsim.optim.segments import Segments
from fedsim.params import Layout
from tests.fedsim.optim.oracles import client_runs, problem, stack_run

# Equal shapes apart and side by side, wide and tall.
MATRICES = Layout.of({"a": (8, 16), "b": (16, 8), "c": (8, 16), "d": (8, 16), "e": (5, 5)})
SPEC = {"name": "muon", "lr": 0.02, "weight_decay": 0.1}


@pytest.fixture
def exact_torch_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's Muon casts to bf16 whatever it is given; here that cast is a plain copy."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())


@pytest.mark.parametrize("kappa", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.usefixtures("exact_torch_muon")
def test_a_stack_equals_torch_muon_client_by_client(kappa: str, nesterov: bool) -> None:
    x, grads = problem(layout=MATRICES)

    def make(params: list[nn.Parameter]) -> optim.Optimizer:
        return optim.Muon(params, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=kappa)

    ours = stack_run({**SPEC, "kappa": kappa, "nesterov": nesterov}, x, grads, MATRICES)
    assert (ours - client_runs(make, x, grads, MATRICES)).abs().max() < 2e-15


def test_newton_schulz_in_bf16_is_another_result() -> None:
    x, grads = problem(5, layout=MATRICES)
    theirs = client_runs(lambda p: optim.Muon(p, lr=0.02, weight_decay=0.1), x, grads, MATRICES)
    full, half = (stack_run({**SPEC, "precision": p}, x, grads, MATRICES) for p in ("full", "bf16"))
    assert 1e-4 < (full - theirs).abs().max() < 1e-2
    assert 1e-4 < (full - half).abs().max() < 1e-2
    assert torch.equal(full, stack_run(SPEC, x, grads, MATRICES))  # auto, on a CPU


def test_each_singular_value_goes_through_the_polynomial() -> None:
    m = problem(1)[0][:, :128].view(3, 8, 16)
    u, values, v = torch.linalg.svd(m, full_matrices=False)
    expected = values / values.norm(dim=-1, keepdim=True)
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        expected = first * expected + second * expected**3 + third * expected**5
    assert torch.allclose(newton_schulz(m, 5), u * expected[:, None] @ v, atol=1e-13)
    assert 0.6 < expected.min() < 0.95 and 1.05 < expected.max() < 1.25  # near one, and never one


def test_without_newton_schulz_muon_is_normalised_momentum() -> None:
    layout = Layout.of({"w": (4, 6)})
    x, grads = problem(1, layout=layout)
    moved = x - stack_run({**SPEC, "steps": 0, "lr": 1.0, "weight_decay": 0.0, "nesterov": False}, x, grads, layout)
    assert torch.allclose(moved, grads[0] / grads[0].norm(dim=1, keepdim=True), atol=1e-15)


def test_the_size_of_momentum_does_not_matter() -> None:
    x, grads = problem(layout=MATRICES)
    assert torch.allclose(stack_run(SPEC, x, grads, MATRICES), stack_run(SPEC, x, 1e3 * grads, MATRICES), atol=1e-12)


@pytest.mark.parametrize("name", ["muon", "hybrid_auon"])
def test_a_kernel_is_the_matrix_of_its_outputs(name: str) -> None:
    kernel, flat = Layout.of({"k": (8, 4, 3, 3)}), Layout.of({"k": (8, 36)})
    x, grads = problem(3, layout=flat)
    spec = {"name": name, "lr": 0.1}
    assert torch.equal(stack_run(spec, x, grads, kernel), stack_run(spec, x, grads, flat))


def test_kappa_of_a_kernel_comes_from_the_matrix_and_is_not_one() -> None:
    tall = Layout.of({"k": (16, 1, 2, 2)})
    x, grads = problem(1, layout=tall)
    moved = x - stack_run({**SPEC, "lr": 1.0, "weight_decay": 0.0}, x, grads, tall)
    assert torch.allclose(moved.view(3, 16, 4), 2.0 * newton_schulz(grads[0].view(3, 16, 4), 5), atol=1e-13)


def test_vectors_embeddings_and_heads_get_the_other_rule() -> None:
    layout = Layout(
        names=("w", "bias", "embed", "head"),
        shapes=((4, 6), (4,), (5, 3), (2, 4)),
        roles=("matrix", "vector", "embed", "head"),
    )
    x, grads = problem(4, layout=layout)
    ours = stack_run({**SPEC, "other": {"name": "adamw", "lr": 0.03}}, x, grads, layout)
    alone = stack_run({"name": "adamw", "lr": 0.03}, x, grads, layout)
    assert torch.allclose(ours[:, 24:], alone[:, 24:], rtol=0, atol=1e-15)
    assert not torch.allclose(ours[:, :24], alone[:, :24])


def reference_hybrid(x: Tensor, grads: Tensor, lr: float, beta: float, steps: int, raw: bool) -> Tensor:
    """Hybrid-AuON on one matrix of one client, line by line."""
    a, b, c = 3.4445, -4.7750, 2.0315
    m = torch.zeros_like(x)
    for g in grads:
        m = beta * m + (1 - beta) * g
        u = (1 - beta) * g + beta * m
        flip = u.shape[0] > u.shape[1]
        u = u.T if flip else u
        u = u / u.norm()
        for _ in range(steps):
            gram = u @ u.T
            u = a * u + (b * gram + c * gram @ gram) @ u
        u = u.T if flip else u
        inside = 1.5 * u / u.norm() if raw else u
        x = x - lr * u / (torch.sqrt(torch.mean(torch.cosh(inside) ** 2)) + 1e-8)
    return x


@pytest.mark.parametrize("steps, raw", [(1, False), (5, True), (3, False)])
def test_hybrid_auon_equals_a_plain_loop_on_each_matrix(steps: int, raw: bool) -> None:
    x, grads = problem(layout=MATRICES)
    ours = stack_run({"name": "hybrid_auon", "lr": 0.1, "steps": steps, "raw": raw}, x, grads, MATRICES)
    for client in range(3):
        for name, view in MATRICES.views(ours[client]).items():
            own = torch.stack([MATRICES.views(g[client])[name] for g in grads])
            expected = reference_hybrid(MATRICES.views(x[client])[name], own, 0.1, 0.95, steps, raw)
            assert torch.allclose(view, expected, atol=1e-7)  # the package adds 1e-7 to a norm


def test_one_iteration_of_hybrid_auon_by_hand() -> None:
    layout = Layout.of({"w": (2, 2)})
    x, g = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[3.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    moved = -stack_run({"name": "hybrid_auon", "lr": 1.0}, x, g[None], layout)
    p, q = (3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5 for s in (0.6, 0.8))  # 3 and 4 over their norm 5
    rms = ((cosh(p) ** 2 + cosh(q) ** 2 + 2) / 4) ** 0.5
    assert moved[0].tolist() == pytest.approx([p / rms, 0, 0, q / rms])


def test_the_packages_hybrid_auon_is_muon_without_kappa() -> None:
    layout = Layout.of({"w": (16, 32)})
    x, grads = problem(layout=layout)
    hybrid = stack_run({"name": "hybrid_auon", "lr": 0.1, "steps": 5, "raw": True}, x, grads, layout)
    muon = stack_run({"name": "muon", "lr": 0.1, "weight_decay": 0.0}, x, grads, layout)  # kappa is 1: more columns
    gamma_term = 1.5**2 / (2 * 16 * 32)
    assert 0.1 * gamma_term * 0.05 < (hybrid - muon).abs().max() < 0.1 * 7 * gamma_term * 2


def test_matrices_of_one_shape_are_one_group_and_come_back_to_their_places() -> None:
    seg = Segments.of(MATRICES)
    assert [(g.shape, g.tensors) for g in groups_of(seg)] == [((8, 16), (0, 2, 3)), ((16, 8), (1,)), ((5, 5), (4,))]
    flat = torch.arange(2.0 * MATRICES.size).view(2, -1)
    back = torch.zeros_like(flat)
    for group in groups_of(seg):
        m = group.take(flat)
        assert m.shape == (2, group.count, *group.shape)
        group.put_(back, m)
    assert torch.equal(back, flat)
    third = groups_of(seg)[0].take(flat)[1, 1]
    assert torch.equal(third, MATRICES.views(flat)["c"][1])


def test_a_matrix_rule_has_no_compiled_form_and_says_so() -> None:
    with pytest.raises(ValueError, match="Muon has no compiled form; take auto or eager"):
        build({"name": "muon", "backend": "compiled"}, MATRICES)


@pytest.mark.parametrize("key, value", [("kappa", "none"), ("precision", "fp8"), ("momentum", 1.0), ("steps", -1)])
def test_a_wrong_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{key}: (must lie|expected)"):
        build({**SPEC, key: value}, MATRICES)
