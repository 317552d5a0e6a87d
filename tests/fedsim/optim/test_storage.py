"""8-bit and bfloat16 states: tables and codes, whole runs against plain loops, the zero-code hazard, memory."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim.optim import OptState, build
from fedsim.optim import storage as storage_module
from fedsim.optim.backends import INDUCTOR
from fedsim.optim.rule import Named, State
from fedsim.optim.segments import Segments
from fedsim.optim.storage import Coded, code_table, make_storage
from fedsim.optim.table import RULES
from fedsim.params import Layout
from fedsim.streams import Streams
from tests.fedsim.optim.oracles import problem, stack_run, state_bytes

# One whole number of blocks, one short last block, one tensor too small to code, one embedding.
LAYOUT = Layout(
    names=("w", "tail", "bias", "embed"),
    shapes=((64, 64), (50, 83), (64,), (80, 64)),
    roles=("matrix", "matrix", "vector", "embed"),
)
ADAM = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}


def floats(clients: int = 2, steps: int = 4, layout: Layout = LAYOUT) -> tuple[Tensor, Tensor]:
    """Heavy-tailed gradients, as quantization meets them."""
    x, grads = problem(steps, clients, layout=layout)
    return x.float(), (grads**5).float()


def nearest(value: Tensor, table: Tensor) -> Tensor:
    """Codes of one block by looking at every entry of the table."""
    return (value[:, None] / value.abs().max() - table).abs().argmin(1)


@pytest.mark.parametrize("signed", [True, False])
def test_the_tables_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(code_table(signed), functional.create_dynamic_map(signed=signed))


def test_the_tables_by_hand() -> None:
    signed, unsigned = code_table(True), code_table(False)
    assert len(signed.unique()) == len(unsigned.unique()) == 256
    assert torch.equal(signed[:127].flip(0), -signed[128:255]) and signed[127] == 0 and signed[255] == 1
    assert signed[128].item() == pytest.approx(0.55e-6) and signed[254].item() == pytest.approx(1 - 0.9 / 128)
    assert unsigned[1].item() == pytest.approx(0.325e-6) and unsigned[254].item() == pytest.approx(1 - 0.9 / 256)


def coded(states: tuple[State, ...], layout: Layout = LAYOUT) -> tuple[Coded, Named]:
    """A storage and its fresh buffers for two clients."""
    storage = make_storage("dyn8", states, Segments.of(layout), layout.roles)
    assert isinstance(storage, Coded)
    buffers = {}
    for state in storage.stored():
        width = sum(state.per) if isinstance(state.per, tuple) else layout.size
        dtype = getattr(torch, state.dtype or "float32")
        buffers[state.name] = torch.full((2, width), state.init, dtype=dtype)
    return storage, Named(buffers)


def test_every_code_is_the_nearest_in_its_block_of_one_tensor_of_one_client() -> None:
    storage, s = coded((State("m"), State("v")))
    _, grads = floats()
    s.m, s.v = grads[0].clone(), grads[1].square().clamp(min=1e-30)
    storage.encode_(s)
    worst = 0.0
    for client in range(2):
        for name, signed in (("m", True), ("v", False)):
            codes, at = getattr(s, f"{name}_codes")[client], 0
            for tensor in ("w", "tail"):
                flat = LAYOUT.views(getattr(s, name)[client])[tensor].flatten()
                for block in flat.split(256):
                    table = code_table(signed).double()[None, 0 if signed else 1 :]  # v is positive everywhere
                    away = (block.double()[:, None] / block.double().abs().max() - table).abs()
                    own = codes[at : at + len(block), None].long() - (0 if signed else 1)
                    worst = max(worst, float((away.gather(1, own)[:, 0] - away.amin(1)).max()))
                    at += len(block)
            assert at == len(codes) == 64 * 64 + 50 * 83
    assert worst < 1e-7  # a midpoint, but for rounding
    assert torch.equal(s.m_absmax[0, :16], LAYOUT.views(s.m[0])["w"].view(16, 256).abs().amax(1))


def test_small_tensors_and_embeddings_stay_as_they_are() -> None:
    storage, s = coded((State("m"),))
    _, grads = floats()
    s.m = grads[0].clone()
    storage.encode_(s)
    storage.decode_(s, grads[0])
    views = LAYOUT.views(s.m), LAYOUT.views(grads[0])
    for name in LAYOUT.names:
        assert torch.equal(views[0][name], views[1][name]) == (name in ("bias", "embed"))


@given(st.integers(0, 2**31 - 1), st.booleans())
def test_what_was_decoded_encodes_to_the_same_codes(seed: int, signed: bool) -> None:
    """With a positive peak in each block; a negative one has no code of its own, only -0.993."""
    layout, name = Layout.of({"w": (64, 65)}), "m" if signed else "v"
    storage, s = coded((State(name),), layout)
    value = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(seed)) ** 5
    value[:, ::256] = 5.0**5
    setattr(s, name, value if signed else value.square())
    storage.encode_(s)
    codes = getattr(s, f"{name}_codes").clone()
    storage.decode_(s, value)
    storage.encode_(s)
    assert torch.equal(getattr(s, f"{name}_codes"), codes)


def test_a_fresh_state_is_exactly_its_initial_value() -> None:
    for rule in ({"name": "adagrad", "init": 0.2}, {"name": "yogi", "init": 1e-6}, ADAM):
        optimizer = build({"lr": 0.1, **rule, "state_dtype": "dyn8"}, LAYOUT)
        part, state = optimizer.recipe.groups[0], optimizer.init(torch.zeros(2, LAYOUT.size))
        assert part.storage is not None
        s = Named(dict(state.buffers))
        part.storage.decode_(s, torch.zeros(2, LAYOUT.size))
        for own in part.rule.active_states():
            assert torch.equal(getattr(s, own.name), torch.full((2, LAYOUT.size), own.init))


@pytest.mark.parametrize("name", ["adamw", "lion", "amsgrad", "adabelief", "rmsprop"])
@pytest.mark.parametrize("dtype", ["dyn8", "bf16"])
def test_the_first_step_is_exact_since_the_state_is_rounded_after_it(name: str, dtype: str) -> None:
    x, grads = floats(steps=2)
    spec = {"name": name, "lr": 1e-3, "backend": "eager"}
    first, both = stack_run(spec, x, grads[:1], LAYOUT), stack_run(spec, x, grads, LAYOUT)
    assert torch.equal(stack_run({**spec, "state_dtype": dtype}, x, grads[:1], LAYOUT), first)
    assert not torch.equal(stack_run({**spec, "state_dtype": dtype}, x, grads, LAYOUT), both)


def roundtrip(value: Tensor, signed: bool) -> Tensor:
    """One tensor of one client through 8 bits and back, block by block."""
    parts = []
    for block in value.flatten().split(256):
        codes = nearest(block, code_table(signed))
        codes = codes if signed else torch.maximum(codes, (block > 0).long())
        parts.append(code_table(signed)[codes] * block.abs().max())
    return torch.cat(parts).view_as(value)


def reference_adam(x: Tensor, grads: Tensor) -> Tensor:
    """8-bit AdamW on one tensor of one client in float32."""
    m = v = torch.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
        x = x * (1 - 1e-3 * 0.1) - 1e-3 * (m / (1 - 0.9**t)) / (v.sqrt() / sqrt(1 - 0.999**t) + 1e-8)
        m, v = roundtrip(m, True), roundtrip(v, False)
    return x


def test_8_bit_adamw_equals_a_plain_loop_on_each_tensor() -> None:
    x, grads = floats(steps=5)
    ours = stack_run({**ADAM, "state_dtype": "dyn8"}, x, grads, LAYOUT)
    for client in range(2):
        for name in ("w", "tail"):
            own = torch.stack([LAYOUT.views(g[client])[name] for g in grads])
            expected = reference_adam(LAYOUT.views(x[client])[name], own)
            error = (LAYOUT.views(ours[client])[name] - expected).abs()
            # where rounding of float32 tips a code over a midpoint, one entry takes the next code
            assert error.median() < 2e-7 and (error > 5e-7).double().mean() < 1e-3 and error.max() < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_8_bit_adamw_is_near_that_of_bitsandbytes_on_a_cpu() -> None:
    """Its CPU encoder is coarser than the nearest code, so the two agree to a fraction of a step only."""
    bnb = pytest.importorskip("bitsandbytes")
    layout = Layout.of({"w": (64, 64)})
    x, grads = problem(6, 1, layout=layout)
    parameter = torch.nn.Parameter(x[0].float().clone())
    theirs = bnb.optim.AdamW8bit([parameter], lr=1e-3, weight_decay=0.1)
    for g in grads.float():
        parameter.grad = g[0].clone()
        theirs.step()
    ours = stack_run({**ADAM, "state_dtype": "dyn8"}, x.float(), grads.float(), layout)[0]
    exact = stack_run(ADAM, x.float(), grads.float(), layout)[0]
    assert (ours - parameter.detach()).abs().max() < 1e-3
    assert (ours - parameter.detach()).abs().median() < 2e-5
    assert (ours - exact).abs().max() < 1e-3


@pytest.mark.parametrize("floor, at_most, at_least", [(True, 2.0, 0.05), (False, 1e9, 1e3)])
def test_a_positive_second_moment_is_never_coded_as_zero(
    floor: bool, at_most: float, at_least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry with a gradient of 1e-4 beside one of 1, then none: its m has a code, its v is below the first one."""
    if not floor:
        table = {signed: code_table(signed) for signed in (False, True)}
        plain = {signed: torch.cat([(t[:-1] + t[1:]) / 2, torch.tensor([torch.inf])]) for signed, t in table.items()}
        monkeypatch.setattr(storage_module, "code_bounds", plain.__getitem__)
        assert 1e-8 < table[False][1] / 2
    layout = Layout.of({"w": (64, 64)})
    first = torch.zeros(1, layout.size)
    first[0, 0], first[0, 1] = 1.0, 1e-4
    second = torch.zeros_like(first)
    optimizer = build({"name": "adam", "lr": 1e-3, "state_dtype": "dyn8"}, layout)
    x = torch.zeros(1, layout.size)
    state = optimizer.init(x)
    optimizer.step_(x, first, state)
    before = x.clone()
    optimizer.step_(x, second, state)
    assert at_least < float((x - before)[0, 1].abs() / 1e-3) < at_most


def test_memory_is_two_bytes_and_a_thirtysecond_for_adam() -> None:
    layout = Layout.of({"w": (64, 64), "u": (128, 64)})
    assert state_bytes({**ADAM, "state_dtype": "dyn8"}, layout) == layout.size * 2 + layout.size // 256 * 8
    assert state_bytes({**ADAM, "state_dtype": "bf16"}, layout) == layout.size * 4
    assert state_bytes(ADAM, layout) == layout.size * 8
    assert state_bytes({"name": "lion", "state_dtype": "dyn8"}, layout) == layout.size + layout.size // 64


def test_8_bit_galore_codes_its_moments_and_not_its_basis() -> None:
    layout = Layout.of({"w": (128, 96), "bias": (128,)})
    spec = {"name": "galore", "rank": 32, "gap": 2, "lr": 0.01}
    low = 128 * 32
    bytes_low, other = 2 * (low + low // 256 * 4), 4 * 2 * 128
    assert state_bytes({**spec, "state_dtype": "dyn8"}, layout) == bytes_low + 4 * 96 * 32 + other
    x, grads = (t.float() for t in problem(5, 2, layout=layout))
    exact, ours = stack_run(spec, x, grads, layout), stack_run({**spec, "state_dtype": "dyn8"}, x, grads, layout)
    moved = (exact - x).norm()
    assert 1e-4 < (ours - exact).norm() / moved < 0.05


def test_bf16_states_equal_a_plain_loop() -> None:
    layout = Layout.of({"w": (64, 64)})
    x, grads = floats(layout=layout)
    ours = stack_run({"name": "lion", "lr": 1e-3, "weight_decay": 0.1, "state_dtype": "bf16"}, x, grads, layout)
    m, y = torch.zeros_like(x), x.clone()
    for g in grads:
        y = y * (1 - 1e-4) - 1e-3 * (m + 0.1 * (g - m)).sign()
        m = (m + 0.01 * (g - m)).bfloat16().float()
    assert torch.allclose(ours, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, e in RULES.items() if e.needs == {"grad"}])
@pytest.mark.parametrize("dtype", ["dyn8", "bf16"])
def test_any_rule_runs_on_stored_states_and_no_client_sees_another(name: str, dtype: str) -> None:
    layout = Layout.of({"w": (64, 64), "bias": (3,)})
    x, grads = (t.float() for t in problem(3, 3, layout=layout))
    optimizer = build({"name": name, "lr": 1e-3, "weight_decay": 0.1, "state_dtype": dtype}, layout)

    def run(rows: list[int]) -> Tensor:
        y, ids = x[rows].clone(), torch.tensor(rows)
        state = optimizer.init(y)
        streams = Streams(0, ids, torch.zeros_like(ids))
        for g in grads:
            optimizer.step_(y, g[rows], state, streams=streams)
        return optimizer.final(y, state)

    whole = run([0, 1, 2])
    assert torch.isfinite(whole).all() and not torch.equal(whole, x)
    assert torch.allclose(run([1]), whole[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, e in RULES.items() if e.needs == {"grad"}])
def test_states_named_for_it_are_never_negative_and_others_may_be(name: str) -> None:
    """The unsigned table is chosen by these names."""
    layout = Layout.of({"w": (8, 16), "bias": (8,)})
    x, grads = problem(6, layout=layout)
    optimizer, ids = build({"name": name, "lr": 0.01}, layout), torch.arange(3)
    state = optimizer.init(x)
    for g in grads:
        optimizer.step_(x, g, state, streams=Streams(0, ids, torch.zeros_like(ids)))
        for part in optimizer.recipe.groups:
            for own in filter(storage_module.is_dense, part.states):
                if own.name in storage_module.NEVER_NEGATIVE:
                    assert (state.buffers[part.name + own.name] >= 0).all()
    for part in optimizer.recipe.groups:
        for own in filter(storage_module.is_dense, part.states):
            if own.name not in (*storage_module.NEVER_NEGATIVE, "on"):  # a mask
                assert (state.buffers[part.name + own.name] < 0).any(), own.name


def test_stored_states_survive_saving_in_mid_run() -> None:
    x, grads = floats()
    optimizer = build({**ADAM, "state_dtype": "dyn8"}, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    for g in grads[:2]:
        optimizer.step_(y, g, state)
    resumed, z = OptState.from_rows({n: v.clone() for n, v in state.to_rows().items()}), y.clone()
    for g in grads[2:]:
        optimizer.step_(y, g, state)
        optimizer.step_(z, g, resumed)
    assert torch.equal(y, z)


def test_a_client_that_does_not_step_keeps_its_codes() -> None:
    x, grads = floats()
    optimizer = build({**ADAM, "state_dtype": "dyn8"}, LAYOUT)
    state = optimizer.init(x)
    optimizer.step_(x, grads[0], state)
    before = {n: v.clone() for n, v in state.buffers.items()}
    optimizer.step_(x[:1], grads[1, :1], state)
    assert all(
        torch.equal(v[1], before[n][1]) and not torch.equal(v[0], before[n][0]) for n, v in state.buffers.items()
    )


@pytest.mark.parametrize(
    "more, message",
    [
        ({"state_dtype": "int4"}, "state_dtype: expected one of fp32, bf16, dyn8, got 'int4'"),
        ({"state_dtype": "dyn8", "state_scope": "server"}, "server averages states over clients, and m_codes"),
        ({"state_dtype": "dyn8", "backend": "fused"}, "no fused kernel"),
    ],
)
def test_what_cannot_be_stored_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({**ADAM, **more}, LAYOUT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_compiled_8_bit_step_equals_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(INDUCTOR), "suits", lambda *of: True)  # so that it runs where there is no GPU
    x, grads = floats(3)
    spec = {**ADAM, "state_dtype": "dyn8"}
    compiled = stack_run({**spec, "backend": "compiled"}, x, grads, LAYOUT)
    assert not torch.equal(compiled, x)
    error = (compiled - stack_run({**spec, "backend": "eager"}, x, grads, LAYOUT)).abs()
    assert error.median() < 2e-7 and (error > 5e-7).double().mean() < 1e-3
