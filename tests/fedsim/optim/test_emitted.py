"""Compiled elementwise steps: what is written, and that it says what the eager step says."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fedsim.optim import OptState, build
from fedsim.optim.assemble import assemble
from fedsim.optim.backends import INDUCTOR, choose_backend, emit, emitted
from fedsim.optim.rule import Named, Rule
from fedsim.optim.segments import Segments
from fedsim.params import Layout
from tests.fedsim.optim.oracles import LAYOUT, problem


def run(spec: dict[str, Any], backend: str, x: Tensor, grads: Tensor, **inputs: Any) -> tuple[Tensor, OptState]:
    optimizer = build({**spec, "backend": backend}, LAYOUT)
    y = x.clone()
    state = optimizer.init(y)
    for i, g in enumerate(grads):
        k = 3 if i < 3 else 2
        optimizer.step_(y[:k], g[:k], state, **inputs)
    return y, state


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"name": "adan", "lr": 0.1, "weight_decay": 0.1}, {}),
    ({"name": "diffgrad", "lr": 0.1}, {}),
    ({"name": "nadam", "lr": [0.1, 0.2, 0.3]}, {}),
    ({"name": "schedule_free_adamw", "lr": 0.1, "weight_decay": 0.1}, {}),
    ({"name": "lion", "lr": 0.1, "lr_mult": {"b": 0.5}}, {"lr_scale": torch.tensor([1.0, 0.5, 2.0])}),
    ({"name": "adam", "lr": 0.1, "clip": {"value": 0.5}, "average": {"name": "swa"}}, {}),
]


@pytest.mark.parametrize("spec, inputs", CASES, ids=[spec["name"] for spec, _ in CASES])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_a_compiled_step_is_the_eager_one_with_bad_gradients_prefixes_and_per_client_numbers(
    spec: dict[str, Any], inputs: dict[str, Any], dtype: torch.dtype, bound: float
) -> None:
    x, grads = (t.to(dtype) for t in problem())
    grads[1, 1, 5], grads[2, 0, 0] = float("nan"), float("inf")
    (got, one), (expected, two) = (run(spec, how, x, grads, **inputs) for how in ("compiled", "eager"))
    assert (got - expected).abs().max() < bound
    assert one.t.tolist() == two.t.tolist() and one.skipped.tolist() == two.skipped.tolist() == [1, 1, 0]
    for name, value in one.buffers.items():
        assert torch.allclose(value, two.buffers[name], rtol=10 * bound, atol=bound), name
    assert all(torch.allclose(v, two.host[n], rtol=1e-14) for n, v in one.host.items())


def test_long_rows_walked_in_several_places_and_by_several_threads_step_every_coordinate_once(
    set_threads: Callable[[int], None],
) -> None:
    layout = Layout.of({"w": (700, 203), "b": (7,)})
    x, grads = (t.float() for t in problem(steps=2, clients=2, layout=layout))
    grads[1, 0, -1] = float("nan")
    ends = []
    for name in ("sgd", "adamw"):
        for backend, count in (("eager", 1), ("compiled", 1), ("compiled", 2)):
            set_threads(count)
            optimizer = build({"name": name, "lr": 0.1, "weight_decay": 0.1, "backend": backend}, layout)
            y = x.clone()
            state = optimizer.init(y)
            for g in grads:
                optimizer.step_(y, g, state)
            ends.append(y)
            assert state.skipped.tolist() == [1, 0]
    for eager, one, two in (ends[:3], ends[3:]):
        assert torch.allclose(one, eager, atol=1e-6) and torch.equal(one, two)


@pytest.mark.parametrize("spec", [{"name": "sgd"}, {"name": "sgd", "lr_mult": {"b": 0.5}}, {"name": "signsgd"}])
def test_a_stack_out_of_the_cache_is_looked_through_while_it_is_stepped_and_bad_rows_are_put_back(
    spec: dict[str, Any], set_threads: Callable[[int], None]
) -> None:
    set_threads(1)  # more take each a part of the stack, after a look at all of it
    layout = Layout.of({"w": (1_500, 1_001), "b": (500,)})
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(2, 4, layout.size, generator=generator)
    g[0, -1], g[2, 0], g[2, 77_777] = float("nan"), float("inf"), -float("inf")
    y, z = x.clone(), x.clone()
    for backend, t in (("compiled", y), ("eager", z)):
        optimizer = build({**spec, "lr": 0.1, "weight_decay": 0.1, "backend": backend}, layout)
        state = optimizer.init(t)
        optimizer.step_(t, g, state)
        assert state.skipped.tolist() == [1, 0, 1, 0] and state.t.tolist() == [0, 1, 0, 1]
    assert torch.equal(y[[0, 2]], x[[0, 2]]) and torch.allclose(y, z, atol=1e-6)


@pytest.mark.parametrize(
    "name, arrays, numbers, logs", [("sgd", [], ["lr"], 1), ("lion", ["m"], ["a1", "a2", "lr"], 0)]
)
def test_a_log_is_kept_where_a_step_writes_to_x_alone(
    name: str, arrays: list[str], numbers: list[str], logs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources: list[str] = []
    monkeypatch.setattr(emitted, "library", lambda source, dtype: sources.append(source))
    optimizer = build({"name": name, "lr": 0.1}, LAYOUT)
    emitted.kernel_of(optimizer.recipe, torch.float32, dict.fromkeys(arrays), dict.fromkeys(numbers))
    assert f"#define LOGS {logs}\n" in sources[0]


def test_an_operation_without_a_line_of_arithmetic_is_refused() -> None:
    def step(x: Tensor, g: Tensor) -> None:
        x.sub_(g.sum(1, keepdim=True))

    with pytest.raises(emit.NotElementwise, match="sum"):
        emit.source(emit.record(step, [(2, 3), (2, 3)], torch.float32), ["x", "g"], [], [], gradient=1)


def test_without_a_compiler_steps_are_eager_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emitted, "library", lambda *of: None)
    emitted._warn.cache_clear()
    x, grads = problem()
    ends = [run({"name": "lion", "lr": 0.1}, "eager", x, grads)[0]]
    with pytest.warns(UserWarning, match="no C.. compiler works here") as caught:
        ends += [run({"name": "lion", "lr": 0.1}, "compiled", x, grads)[0] for _ in range(2)]
    assert len(caught) == 1
    assert build({"name": "lion"}, LAYOUT).backend_on(torch.device("cpu")) == "eager"  # auto says nothing
    assert build({"name": "adam"}, LAYOUT).backend_on(torch.device("cpu")) == "fused"
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_workers_that_take_their_first_step_at_once_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    kept = emitted.library
    monkeypatch.setattr(emitted, "library", lambda text, dtype: made.append(text) or kept(text, dtype))
    optimizer = build({"name": "adan", "lr": 0.1}, LAYOUT)
    x, grads = problem()

    def work(_: int) -> Tensor:
        y = x.clone()
        state = optimizer.init(y)
        for g in grads:
            optimizer.step_(y, g, state)
        return y

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(work, range(8)))
    assert len(made) == 1 and all(torch.equal(end, ends[0]) for end in ends)


def test_auto_names_what_it_takes() -> None:
    names = ("adan", "lamb", "muon", "sophia_g")
    found = {n: build({"name": n}, LAYOUT).backend_on(torch.device("cpu")) for n in names}
    assert found == {"adan": "compiled", "lamb": "eager", "muon": "eager", "sophia_g": "compiled"}


@dataclass(frozen=True, kw_only=True)
class Damped(Rule):
    """An elementwise rule that takes curvature at every step."""

    needs: ClassVar[frozenset[str]] = frozenset({"grad", "hvp"})
    inputs: ClassVar[tuple[str, ...]] = ("hvp",)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return g / (s.hvp * s.hvp + 1)


def test_auto_names_what_it_takes_with_curvature_at_every_step() -> None:
    optimizer = build({"name": f"{__name__}:Damped", "lr": 0.1}, LAYOUT)
    x = torch.zeros(2, LAYOUT.size)
    block, _ = assemble(optimizer.recipe, x, optimizer.init(x), lr_scale=1.0, aux={"hvp": x}, streams=None)
    assert choose_backend(optimizer.recipe, x, block).name == "compiled" == optimizer.backend_on(torch.device("cpu"))
    assert build({"name": "sophia_g", "every": 1}, LAYOUT).backend_on(torch.device("cpu")) == "eager"


def test_a_damaged_state_is_refused_before_memory_behind_it_is_touched() -> None:
    x, grads = problem()
    for backend in ("compiled", "eager", "fused"):
        optimizer = build({"name": "adam", "lr": 0.1, "backend": backend}, LAYOUT)
        state = optimizer.init(x)
        state.buffers["v"] = state.buffers["v"][:, :-1]
        with pytest.raises(ValueError, match=r"state 'v' should be \[3, \d+\] of torch.float64, got \[3, \d+\]"):
            optimizer.step_(x.clone(), grads[0], state)
        state.buffers["v"] = torch.zeros(x.shape, dtype=torch.float16)
        with pytest.raises(ValueError, match="state 'v' .* got .* of torch.float16"):
            optimizer.step_(x.clone(), grads[0], state)
    optimizer = build({"name": "sgd", "lr": 0.1, "average": {"name": "swa"}, "backend": "compiled"}, LAYOUT)
    state = optimizer.init(x)
    state.buffers["average"] = state.buffers["average"][:, :5]
    with pytest.raises(ValueError, match=r"got an input \[3, 5\]"):
        optimizer.step_(x.clone(), grads[0], state)


def test_a_packed_state_of_another_length_is_refused() -> None:
    state = build({"name": "adam", "lr": 0.1}, LAYOUT).init(torch.zeros(2, LAYOUT.size))
    with pytest.raises(ValueError, match="came with 3"):
        state.unpack_(torch.zeros(2, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_compiled_step_of_a_gpu_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(INDUCTOR), "suits", lambda *of: True)  # so that it runs where there is no GPU
    monkeypatch.setattr(emitted.Emitted, "suits", lambda *of: False)
    x, grads = problem()
    got, expected = (run({"name": "lamb", "lr": 0.1}, how, x, grads)[0] for how in ("compiled", "eager"))
    assert torch.allclose(got, expected, atol=1e-12)
