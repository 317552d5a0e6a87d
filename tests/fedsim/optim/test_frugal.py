"""FRUGAL against plain loops with the parts that it drew; what is drawn; limits and the rounding hazard."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, optim

from fedsim.optim import Optimizer, OptState, build
from fedsim.params import Layout
from tests.build import streams
from tests.fedsim.optim.oracles import client_runs, problem, state_bytes

LAYOUT = Layout.of({"tall": (10, 6), "bias": (5,), "wide": (6, 14), "again": (10, 6), "square": (8, 8)})
SPEC = {"name": "frugal", "lr": 0.01, "gap": 3, "weight_decay": 0.1}


def run(
    spec: dict[str, Any], x: Tensor, grads: Tensor, layout: Layout = LAYOUT
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The stack after all steps, and the state after each."""
    optimizer, y, ids = build(spec, layout), x.clone(), torch.arange(len(x))
    state, seen = optimizer.init(y), []
    for g in grads:
        optimizer.step_(y, g, state, streams=streams(ids))
        seen.append({n: b.clone() for n, b in state.buffers.items()})
    return y, seen


def reference(x: Tensor, grads: Tensor, part: list[Any], rest: str, iota: float) -> Tensor:
    """One matrix of one client: AdamW on m[part], restarted every 3 steps, and the rest's own rule."""
    lr, decay, beta1, beta2, eps = 0.01, 0.1, 0.9, 0.999, 1e-8
    x = x.clone()
    for step, g in enumerate(grads):
        where, t = part[step], step % 3 + 1
        x *= 1 - lr * decay
        if t == 1:
            m = v = torch.zeros_like(g[where])
        m, v = beta1 * m + (1 - beta1) * g[where], beta2 * v + (1 - beta2) * g[where] ** 2
        left = g.clone()
        left[where] = 0
        x -= lr * iota * {"sign": left.sign(), "sgd": left, "none": 0 * left}[rest]
        x[where] -= lr * (m / (1 - beta1**t)) / (v.sqrt() / sqrt(1 - beta2**t) + eps)
    return x


@pytest.mark.parametrize("rest, iota", [("sign", 1.0), ("sgd", 0.5), ("none", 1.0)])
@pytest.mark.parametrize("kind", ["columns", "rows", "randk"])
def test_index_kinds_equal_a_plain_loop_on_each_matrix(kind: str, rest: str, iota: float) -> None:
    x, grads = problem(8, layout=LAYOUT)
    ours, states = run({**SPEC, "kind": kind, "rest": rest, "rest_scale": iota}, x, grads)
    at = 0
    for name in ("tall", "again", "wide", "square"):  # the order of groups of equal shapes
        shape = dict(zip(LAYOUT.names, LAYOUT.shapes, strict=True))[name]
        n = {"columns": shape[1], "rows": shape[0], "randk": shape[0] * shape[1]}[kind]
        num = int(n * 0.25)
        for client in range(3):
            part = []
            for state in states:
                index = state["index"][client, at : at + num].long()
                assert len(index.unique()) == num and 0 <= index.min() and index.max() < n
                whole = (slice(None), index) if kind == "columns" else (index,)
                part.append(whole if kind != "randk" else (index // shape[1], index % shape[1]))
            own = torch.stack([LAYOUT.views(g[client])[name] for g in grads])
            expected = reference(LAYOUT.views(x[client])[name], own, part, rest, iota)
            assert torch.allclose(LAYOUT.views(ours[client])[name], expected, rtol=0, atol=1e-14)
        at += num


def test_parts_are_drawn_anew_every_gap_by_client_and_not_by_row() -> None:
    x, grads = problem(7, layout=LAYOUT)
    _, states = run({**SPEC, "kind": "randk"}, x, grads)
    index = torch.stack([state["index"] for state in states])
    same = [bool((a == b).all()) for a, b in zip(index, index[1:], strict=False)]
    assert same == [True, True, False, True, True, False]
    assert not torch.equal(index[0, 0], index[0, 1])
    optimizer = build({**SPEC, "kind": "randk"}, LAYOUT)
    alone = optimizer.init(x[2:])
    optimizer.step_(x[2:].clone(), grads[0, 2:], alone, streams=streams(torch.tensor([2])))
    assert torch.equal(alone.buffers["index"][0], index[0, 2])


def test_every_column_has_the_same_chance() -> None:
    layout = Layout.of({"w": (2, 8)})
    x = torch.zeros(2000, 16)
    _, states = run({**SPEC, "density": 0.25}, x, torch.ones(1, 2000, 16), layout)
    counts = torch.bincount(states[0]["index"].flatten().long(), minlength=8)
    assert ((counts - 500).abs() < 4 * sqrt(2000 * 0.25 * 0.75)).all()


def reference_svd(x: Tensor, grads: Tensor, density: float) -> Tensor:
    """The svd kind on one matrix of one client."""
    lr, decay, beta1, beta2, eps = 0.01, 0.1, 0.9, 0.999, 1e-8
    if x.shape[0] < x.shape[1]:
        return reference_svd(x.T, grads.mT, density).T
    for step, g in enumerate(grads):
        t = step % 3 + 1
        x = x * (1 - lr * decay)
        if t == 1:
            basis = torch.linalg.svd(g, full_matrices=False).Vh[: round(density * x.shape[1])].T
            basis = basis * torch.stack([column[column.abs().argmax()].sign() for column in basis.T])
            m = v = torch.zeros(x.shape[0], basis.shape[1], dtype=x.dtype)
        low = g @ basis
        m, v = beta1 * m + (1 - beta1) * low, beta2 * v + (1 - beta2) * low**2
        left = g - low @ basis.T
        left[left.abs() <= 1e-6 * g.abs().max()] = 0
        x = x - lr * ((m / (1 - beta1**t)) / (v.sqrt() / sqrt(1 - beta2**t) + eps) @ basis.T + left.sign())
    return x


def test_the_svd_kind_equals_a_plain_loop_on_each_matrix() -> None:
    x, grads = problem(7, layout=LAYOUT)
    ours, _ = run({**SPEC, "kind": "svd"}, x, grads)
    for client in range(3):
        for name, view in LAYOUT.views(ours[client]).items():
            if name != "bias":
                own = torch.stack([LAYOUT.views(g[client])[name] for g in grads])
                expected = reference_svd(LAYOUT.views(x[client])[name], own, 0.25)
                assert torch.allclose(view, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["svd", "randomized"])
def test_rounding_is_no_gradient_when_the_rank_is_too_low_to_leave_a_rest(kind: str) -> None:
    """Two samples in a batch give rank two; the rest of rank four is rounding, and its sign would be full steps."""
    layout = Layout.of({"w": (24, 16)})
    generator = torch.Generator().manual_seed(0)
    g = (torch.randn(24, 2, generator=generator) @ torch.randn(2, 16, generator=generator)).view(1, 1, -1)
    x = torch.zeros(1, layout.size)
    spec = {**SPEC, "kind": kind, "weight_decay": 0.0}
    with_rest, states = run(spec, x, g, layout)
    without, _ = run({**spec, "rest": "none"}, x, g, layout)
    assert torch.equal(with_rest, without)
    basis = states[0]["basis"].view(16, 4)
    left = g.view(24, 16) - g.view(24, 16) @ basis @ basis.T
    assert 0 < left.abs().max() < 1e-5 and (left != 0).double().mean() > 0.5  # what the sign would have been taken of


def test_with_all_entries_it_is_adamw_restarted_every_gap() -> None:
    class Restarted:
        def __init__(self, params: list[torch.nn.Parameter]) -> None:
            self.params, self.steps = params, 0

        def step(self) -> None:
            if self.steps % 3 == 0:
                self.inner = optim.AdamW(self.params, 0.01, weight_decay=0.1)
            self.steps += 1
            self.inner.step()

    layout = Layout.of({"w": (8, 16), "v": (4, 8)})
    x, grads = problem(layout=layout)
    for kind in ("columns", "rows", "randk", "blocks"):
        ours, _ = run({**SPEC, "density": 1.0, "kind": kind}, x, grads, layout)
        assert (ours - client_runs(Restarted, x, grads, layout)).abs().max() < 1e-14


@pytest.mark.parametrize("kind", ["columns", "rows", "randk", "blocks", "svd", "randomized"])
def test_with_no_entry_it_is_sign_descent_with_decay(kind: str) -> None:
    layout = Layout.of({"w": (8, 16), "v": (4, 8)})
    x, grads = problem(layout=layout)
    ours, _ = run({**SPEC, "density": 0.0, "kind": kind, "rest_scale": 0.5}, x, grads, layout)
    y = x.clone()
    for g in grads:
        y = y * (1 - 0.01 * 0.1) - 0.01 * 0.5 * g.sign()
    assert torch.allclose(ours, y, rtol=0, atol=1e-14)


def test_vectors_are_adamw_that_never_restarts() -> None:
    x, grads = problem(layout=LAYOUT)
    ours, _ = run({**SPEC, "decay_vectors": True}, x, grads)
    alone = client_runs(lambda p: optim.AdamW(p, 0.01, weight_decay=0.1), x, grads, LAYOUT)
    bias = slice(LAYOUT.offsets[1], LAYOUT.offsets[2])
    assert torch.allclose(ours[:, bias], alone[:, bias], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "order, turns",
    [
        ("ascending", [{0, 1}, {2, 3}, {4, 0}, {1, 2}]),
        ("descending", [{4, 3}, {2, 1}, {0, 4}, {3, 2}]),
        ("mirror", [{0, 4}, {1, 3}, {0, 4}, {1, 3}]),
    ],
)
def test_blocks_take_turns(order: str, turns: list[set[int]]) -> None:
    layout = Layout.of({f"w{i}": (2, 3) for i in range(5)})
    x, grads = problem(8, layout=layout)
    _, states = run({**SPEC, "kind": "blocks", "order": order, "density": 0.4, "gap": 2}, x, grads, layout)
    for step, state in enumerate(states):
        assert {i for i in range(5) if state["active"][1, i]} == turns[step // 2]


def test_random_blocks_differ_between_clients_and_each_equals_a_plain_loop() -> None:
    layout = Layout.of({f"w{i}": (2, 3) for i in range(6)})
    x, grads = problem(7, clients=5, layout=layout)
    ours, states = run({**SPEC, "kind": "blocks", "density": 0.5}, x, grads, layout)
    active = torch.stack([state["active"] for state in states]).bool()
    assert (active.sum(-1) == 3).all() and len({tuple(row.tolist()) for row in active[0]}) > 1
    for client in range(5):
        for i, (name, view) in enumerate(layout.views(ours[client]).items()):
            part = [slice(None) if active[step, client, i] else slice(0) for step in range(7)]
            own = torch.stack([layout.views(g[client])[name] for g in grads])
            expected = reference(layout.views(x[client])[name], own, part, "sign", 1.0)
            assert torch.allclose(view, expected, rtol=0, atol=1e-14)


def test_moments_have_the_size_of_the_part() -> None:
    layout = Layout.of({"w": (16, 8), "v": (4, 12)})

    def memory(kind: str) -> int:
        return state_bytes({**SPEC, "kind": kind}, layout)

    assert memory("columns") == 4 * (2 * (16 * 2 + 4 * 3) + 2 + 3)
    assert memory("rows") == 4 * (2 * (4 * 8 + 1 * 12) + 4 + 1)
    assert memory("randk") == 4 * (2 * (32 + 12) + 32 + 12)
    assert memory("svd") == 4 * (2 * (16 * 2 + 12 * 1) + 8 * 2 + 4 * 1)
    assert memory("blocks") == 4 * 2 * layout.size + 2


def test_a_client_that_starts_late_draws_at_its_own_first_step() -> None:
    x, grads = problem(6, clients=2, layout=LAYOUT)

    def advance(optimizer: Optimizer, y: Tensor, grads: Tensor, state: OptState, ids: Tensor) -> None:
        for g in grads:
            optimizer.step_(y, g, state, streams=streams(ids))

    for kind in ("columns", "svd", "blocks"):
        optimizer, ids, y = build({**SPEC, "kind": kind}, LAYOUT), torch.arange(2), x.clone()
        state = optimizer.init(y)
        advance(optimizer, y[:1], grads[:2, :1], state, ids[:1])
        advance(optimizer, y, grads[2:], state, ids)
        alone = x[1:].clone()
        advance(optimizer, alone, grads[2:, 1:], optimizer.init(alone), ids[1:])
        assert torch.allclose(y[1:], alone, rtol=0, atol=1e-14)


def test_drawing_needs_keys_and_only_at_a_refresh() -> None:
    x, grads = problem(2, layout=LAYOUT)
    optimizer = build(SPEC, LAYOUT)
    state = optimizer.init(x)
    with pytest.raises(ValueError, match="draws noise: pass streams"):
        optimizer.step_(x.clone(), grads[0], state)
    optimizer.step_(x, grads[0], state, streams=streams(torch.arange(3)))
    optimizer.step_(x, grads[1], state)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"kind": "diagonal"}, "optimizer.kind: expected one of columns"),
        ({"density": 1.5}, r"optimizer.density: must lie in \[0, 1\]"),
        (
            {"kind": "blocks", "order": "mirror", "density": 0.75},
            "takes matrices in pairs, and density=0.75 of 4 are 3",
        ),
        ({"state_scope": "server"}, "index of optimizer.Frugal have no mean"),
    ],
)
def test_a_wrong_value_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({**SPEC, **more}, LAYOUT)
