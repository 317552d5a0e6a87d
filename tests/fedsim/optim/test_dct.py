"""DCT low rank against plain loops as the authors write it, and its limits."""

from __future__ import annotations

from math import sqrt

import pytest
import scipy.fft
import torch
from torch import Tensor

from fedsim.optim import build
from fedsim.optim.rules.dct import cosine_basis
from fedsim.params import Layout
from tests.fedsim.optim.oracles import problem, stack_run, state_bytes

LAYOUT = Layout.of({"tall": (10, 6), "bias": (5,), "wide": (6, 13), "again": (10, 6), "square": (7, 7)})
SPEC = {"name": "dct_lowrank", "lr": 0.01, "rank": 3, "weight_decay": 0.1}


def test_the_cosine_basis_is_the_orthonormal_dct() -> None:
    for n in (1, 2, 7, 16):
        q = cosine_basis(n, torch.float64, torch.device("cpu"))
        expected = scipy.fft.dct(torch.eye(n, dtype=torch.float64).numpy(), type=2, norm="ortho", axis=1)
        assert torch.allclose(q.T, torch.from_numpy(expected), atol=1e-14)
        assert torch.allclose(q @ q.T, torch.eye(n, dtype=torch.float64), atol=1e-13)


def reference(x: Tensor, grads: Tensor, rank: int, gap: int, rotate: bool, feedback: bool) -> Tensor:
    """One matrix of one client, rotation as the authors' product of old and new columns."""
    lr, decay, beta1, beta2, eps = 0.01, 0.1, 0.9, 0.999, 1e-8
    if x.shape[0] < x.shape[1]:
        return reference(x.T, grads.mT, rank, gap, rotate, feedback).T
    n = x.shape[1]
    q = torch.from_numpy(scipy.fft.dct(torch.eye(n, dtype=torch.float64).numpy(), type=2, norm="ortho", axis=1)).T
    m = v = torch.zeros(x.shape[0], rank, dtype=x.dtype)
    rest, kept = torch.zeros_like(x), torch.zeros(rank, dtype=torch.int64)
    for t, g in enumerate(grads, 1):
        x = x * (1 - lr * decay)
        g = g + rest if feedback else g
        if t == 1 or t % gap == 0:
            old, kept = kept, (g @ q).abs().sum(0).argsort(descending=True)[:rank].sort().values
            if rotate and t > 1:
                turn = (q[:, old].T @ q[:, kept]).round()  # 0 and 1 but for rounding
                m, v = m @ turn, (v @ turn).abs()
        low = g @ q[:, kept]
        rest = g - low @ q[:, kept].T
        m, v = beta1 * m + (1 - beta1) * low, beta2 * v + (1 - beta2) * low**2
        u = (m / (1 - beta1**t)) / (v.sqrt() / sqrt(1 - beta2**t) + eps)
        x = x - lr * u @ q[:, kept].T
    return x


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("rotate, feedback", [(False, False), (True, True), (True, False), (False, True)])
def test_a_stack_equals_a_plain_loop_on_each_matrix(gap: int, rotate: bool, feedback: bool) -> None:
    x, grads = problem(8, layout=LAYOUT)
    spec = {**SPEC, "gap": gap, "rotate": rotate, "error_feedback": feedback}
    ours = stack_run(spec, x, grads, LAYOUT)
    for client in range(3):
        for name, view in LAYOUT.views(ours[client]).items():
            if name == "bias":
                continue
            own = torch.stack([LAYOUT.views(g[client])[name] for g in grads])
            expected = reference(LAYOUT.views(x[client])[name], own, 3, gap, rotate, feedback)
            assert torch.allclose(view, expected, rtol=0, atol=1e-12)


def test_rotation_and_feedback_matter() -> None:
    x, grads = problem(8, layout=LAYOUT)
    plain = stack_run(SPEC, x, grads, LAYOUT)
    for more in ({"rotate": True}, {"error_feedback": True}, {"gap": 3}):
        assert (stack_run({**SPEC, **more}, x, grads, LAYOUT) - plain).abs().max() > 1e-3


def test_vectors_are_adamw_at_the_same_rate() -> None:
    x, grads = problem(layout=LAYOUT)
    ours = stack_run({**SPEC, "decay_vectors": True}, x, grads, LAYOUT)
    alone = stack_run({"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "decay_vectors": True}, x, grads, LAYOUT)
    bias = slice(LAYOUT.offsets[1], LAYOUT.offsets[2])
    assert torch.allclose(ours[:, bias], alone[:, bias], rtol=0, atol=1e-15)


def test_full_rank_is_adam_in_the_cosine_basis_and_not_adam() -> None:
    layout = Layout.of({"w": (9, 6)})
    x, grads = problem(layout=layout)
    ours = stack_run({**SPEC, "rank": 6, "gap": 10**9, "weight_decay": 0.0}, x, grads, layout)
    q = cosine_basis(6, torch.float64, torch.device("cpu"))
    turned = (grads.view(7, 3, 9, 6) @ q).flatten(2)
    adam = {"name": "adam", "lr": 0.01}
    inside = stack_run(adam, (x.view(3, 9, 6) @ q).flatten(1), turned, layout).view(3, 9, 6) @ q.T
    assert torch.allclose(ours, inside.flatten(1), rtol=0, atol=1e-13)
    assert (ours - stack_run(adam, x, grads, layout)).abs().max() > 1e-3


def test_error_feedback_loses_no_gradient() -> None:
    """With an inner SGD at rate 1, what moved and what is left over add up to all gradients."""
    layout = Layout.of({"w": (9, 6), "v": (6, 9)})
    x, grads = problem(layout=layout)
    spec = {**SPEC, "lr": 1.0, "weight_decay": 0.0, "inner": {"name": "sgd"}, "error_feedback": True, "rank": 2}
    optimizer = build(spec, layout)
    y = x.clone()
    state = optimizer.init(y)
    for g in grads:
        optimizer.step_(y, g, state)
    assert torch.allclose(x - y + state.buffers["error"], grads.sum(0), rtol=0, atol=1e-12)
    assert state.buffers["error"].abs().max() > 0.1


def test_a_matrix_with_a_long_side_gets_the_other_rule() -> None:
    layout = Layout.of({"w": (9, 6), "long": (4, 20)})
    x, grads = problem(layout=layout)
    ours = stack_run({**SPEC, "max_side": 20}, x, grads, layout)
    alone = stack_run({"name": "adamw", "lr": 0.01, "weight_decay": 0.1}, x, grads, layout)
    assert torch.allclose(ours[:, 54:], alone[:, 54:], rtol=0, atol=1e-15)
    assert not torch.allclose(ours[:, :54], alone[:, :54])


def test_clients_keep_indices_and_not_a_basis() -> None:
    layout = Layout.of({"w": (10, 6), "v": (6, 13)})
    moments = 2 * (10 * 3 + 13 * 3)
    assert state_bytes(SPEC, layout) == 4 * (moments + 2 * 3)
    assert state_bytes({**SPEC, "error_feedback": True}, layout) == 4 * (moments + 2 * 3 + layout.size)
    assert build(SPEC, layout).init(torch.zeros(2, layout.size)).buffers["index"].dtype == torch.int32
