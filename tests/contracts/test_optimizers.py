"""What every optimizer of the table must hold, on every back end; a new row of the table is tested by being there."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.optim import Optimizer, OptState, build, segments
from fedsim.optim.backends import FUSED
from fedsim.optim.backends import rows as row_blocks
from fedsim.optim.rule import Beta, Hyper, Share, Size
from fedsim.optim.table import RULES
from fedsim.params import Layout
from tests.build import streams

# A kernel, biases, a tensor of one entry, an embedding and a head: every shape and role that rules tell apart.
LAYOUT = Layout(
    names=("conv", "bias", "w", "scale", "embed", "head"),
    shapes=((4, 2, 3, 3), (4,), (6, 5), (1,), (7, 3), (3, 6)),
    roles=("matrix", "vector", "matrix", "vector", "embed", "head"),
)
STEPS = 6
EXTRA: dict[str, dict[str, Any]] = {
    "spam": {"interval": 3, "guard": 1, "warmup": 2},
    "spam_sparse": {"interval": 3},
    "galore": {"rank": 2, "gap": 3},
    "frugal": {"gap": 3},
    "dct_lowrank": {"rank": 2, "gap": 3, "rotate": True, "error_feedback": True},
}
NOISY = {"sgld", "sghmc"}
STILL = {"name": "sgd", "lr": 0.01}  # for roles that a rule is not for: no decay
NAMES = [name for name in RULES if RULES[name].needs <= {"grad"}]


def section(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "lr": 0.01, "weight_decay": 0.1, **EXTRA.get(name, {}), **more}


def backends(name: str) -> list[str]:
    fused = ["fused"] if FUSED.has_kernel(build(section(name), LAYOUT).recipe) else []
    return ["eager", *fused, *(["compiled"] if RULES[name].kind == "E" else [])]


CASES = [pytest.param(name, backend, id=f"{name}-{backend}") for name in NAMES for backend in backends(name)]


@cache
def problem(clients: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(clients, LAYOUT.size, generator=generator, dtype=torch.float64)
    g = torch.randn(STEPS, clients, LAYOUT.size, generator=generator, dtype=torch.float64)
    return x.to(dtype), g.to(dtype)


def advance(optimizer: Optimizer, x: Tensor, grads: Tensor, state: OptState, ids: Tensor) -> None:
    for g in grads:
        optimizer.step_(x, g, state, streams=streams(ids))


def run(spec: dict[str, Any], rows: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The rows' own x and what is sent, after all steps in a stack of these rows alone, in their order."""
    x, grads = problem(dtype=dtype)
    optimizer = build(spec, LAYOUT)
    y = x[rows].clone()
    state = optimizer.init(y)
    advance(optimizer, y, grads[:, rows], state, rows)
    return y, optimizer.final(y, state)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name, backend", CASES)
def test_a_client_alone_equals_any_row_of_a_stack_in_any_order(name: str, backend: str) -> None:
    spec = section(name, backend=backend)
    whole = run(spec, torch.arange(7))
    for rows in (torch.tensor([4]), torch.tensor([3, 6, 0, 5])):
        for got, expected in zip(run(spec, rows), whole, strict=True):
            assert close(got, expected[rows])


@pytest.mark.parametrize("name", [name for name in NAMES if RULES[name].kind == "E"])
def test_a_compiled_step_equals_an_eager_one(name: str) -> None:
    rows = torch.arange(7)
    compiled, eager = run(section(name, backend="compiled"), rows), run(section(name, backend="eager"), rows)
    assert all(close(a, b) for a, b in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("name, backend", CASES)
def test_clients_outside_the_prefix_keep_every_bit(name: str, backend: str) -> None:
    x, grads = problem()
    optimizer = build(section(name, backend=backend), LAYOUT)
    y, ids = x.clone(), torch.arange(7)
    state = optimizer.init(y)
    advance(optimizer, y, grads[:2], state, ids)
    before = {n: v.clone() for n, v in state.to_rows().items()} | {"x": y.clone()}
    optimizer.step_(y[:3], grads[2, :3], state, streams=streams(ids[:3]))
    after = state.to_rows() | {"x": y}
    assert all(torch.equal(after[n][3:], before[n][3:]) for n in after)
    assert state.t.tolist() == [3] * 3 + [2] * 4
    assert not torch.equal(after["x"][:3], before["x"][:3])


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_moves_nothing_without_decay(name: str) -> None:
    if name in NOISY:
        pytest.skip("a sampler moves by its noise")
    x, _ = problem()
    spec = section(name, weight_decay=0.0, other=STILL) | ({"init": 0.0} if name == "yogi" else {})
    optimizer = build(spec, LAYOUT)
    y = x.clone()
    advance(optimizer, y, torch.zeros(3, *x.shape), optimizer.init(y), torch.arange(7))
    assert torch.equal(y, x)


@pytest.mark.parametrize("name", NAMES)
def test_it_resumes_from_saved_rows_in_mid_run(name: str) -> None:
    x, grads = problem()
    optimizer, ids = build(section(name), LAYOUT), torch.arange(7)
    y = x.clone()
    state = optimizer.init(y)
    advance(optimizer, y, grads[:3], state, ids)
    saved = {n: v.clone() for n, v in state.to_rows().items()}
    again, y_again = build(section(name), LAYOUT), y.clone()
    advance(optimizer, y, grads[3:], state, ids)
    resumed = OptState.from_rows(saved)
    advance(again, y_again, grads[3:], resumed, ids)
    assert torch.equal(y, y_again) and torch.equal(optimizer.final(y, state), again.final(y_again, resumed))


@pytest.mark.parametrize("name", NAMES)
def test_a_number_equals_the_same_number_for_every_client(name: str) -> None:
    rule = build(section(name), LAYOUT).recipe.groups[0].rule
    hints, own = get_type_hints(type(rule), include_extras=True), (Hyper, Beta, Share, Size)
    hyper = {f.name: getattr(rule, f.name) for f in fields(rule) if hints[f.name] in own}  # type: ignore[arg-type]
    per_client = {n: [v] * 7 for n, v in hyper.items() if n not in ("momentum", "beta") or v != 0}
    rows = torch.arange(7)
    plain, spread = (
        run(section(name), rows),
        run(section(name, lr=[0.01] * 7, weight_decay=[0.1] * 7, **per_client), rows),
    )
    assert all(close(a, b) for a, b in zip(plain, spread, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_client_with_a_bad_gradient_reaches_nobody_else(name: str) -> None:
    x, grads = problem()
    ids, others = torch.arange(7), torch.tensor([0, 1, 3, 4, 5, 6])
    spoiled = grads.clone()
    spoiled[1, 2, 11] = float("nan")
    optimizer = build(section(name), LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    advance(optimizer, y, spoiled, state, ids)
    whole, _ = run(section(name), ids)
    assert close(y[others], whole[others]) and torch.isfinite(y).all()
    assert state.skipped.tolist() == [0, 0, 1, 0, 0, 0, 0] and int(state.t[2]) == STEPS - 1
    assert all(torch.isfinite(v).all() for v in state.to_rows().values())


@pytest.mark.parametrize("name", NAMES)
def test_float32_stays_near_float64(name: str) -> None:
    rows = torch.arange(7)
    single, double = run(section(name), rows)[1], run(section(name), rows, torch.float64)[1]
    error = (single.double() - double).abs()
    # a sign of a number near zero may come out either way: then one entry is off by a step or two
    assert error.median() < 1e-6 and (error > 1e-4).double().mean() < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_padding_with_zero_gradient_and_parameter_stays_zero(name: str) -> None:
    if name in NOISY:
        pytest.skip("a sampler moves by its noise")
    x, grads = (t.clone() for t in problem())
    part = slice(LAYOUT.offsets[2], LAYOUT.offsets[2] + 10)
    x[:, part], grads[:, :, part] = 0.0, 0.0
    spec = section(name) | ({"init": 0.0} if name == "yogi" else {})
    optimizer = build(spec, LAYOUT)
    y = x.clone()
    advance(optimizer, y, grads, optimizer.init(y), torch.arange(7))
    assert not y[:, part].any()


class Counting(TorchDispatchMode):
    """Counts the operations that would be launched on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func not in VIEWS
        return func(*args, **(kwargs or {}))


VIEWS = {
    getattr(torch.ops.aten, name).default
    for name in ("view", "expand", "detach", "alias", "unsqueeze", "_unsafe_view", "t", "lift_fresh")
} | {torch.ops.aten.slice.Tensor, torch.ops.aten.unbind.int, torch.ops.aten.select.int, torch.ops.aten.split.Tensor}


@pytest.mark.parametrize("name", NAMES)
def test_a_gpus_launches_grow_with_neither_clients_nor_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_many_launches_hurt", lambda p: True)  # the form that a GPU takes, counted on a CPU
    monkeypatch.setattr(row_blocks, "row_blocks", lambda x, *how: [slice(0, len(x))])

    def launches(clients: int, layers: int) -> int:
        shapes = {f"{i}.{n}": s for i in range(layers) for n, s in (("w", (6, 5)), ("b", (6,)), ("k", (3, 2, 3, 3)))}
        layout = Layout.of(shapes)
        x, ids = torch.ones(clients, layout.size), torch.arange(clients)
        optimizer = build(section(name, backend="eager", clip={"global": 1.0}), layout)
        state = optimizer.init(x)
        optimizer.step_(x, x * 0.1, state, streams=streams(ids))
        with Counting() as counting:
            optimizer.step_(x, x * 0.1, state, streams=streams(ids))
        return counting.count

    assert launches(2, 2) == launches(40, 2) == launches(2, 9)


def test_the_table_says_what_a_user_must_know() -> None:
    for name, entry in RULES.items():
        assert name == name.lower() and entry.paper and entry.memory and entry.note.endswith(".")
        assert set(entry.kind) <= set("ETMX/, ") and entry.needs
        assert len(entry.note) < 120
