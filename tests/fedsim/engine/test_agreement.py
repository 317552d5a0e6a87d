"""All engines give the same numbers: compared in float64, where only a wrong formula is visible."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.engine import Batch, build_engine
from fedsim.engine.compiled import CompiledEngine
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import LOSSES, OF_CLASSES, cross_entropy
from fedsim.engine.ops import Bound, ReLU, Spec
from fedsim.engine.stacked import StackedEngine
from fedsim.params import Layout
from fedsim.task import PlainSession, Session
from fedsim.tasks.models import MODELS
from tests.fedsim.engine.zoo import K, batch, copy_of, gradient, model, numbers_of, rows_of, stack

COUNTS = [4, 2, 0, 3]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).abs().max() <= tolerance)


def check(session: Callable[[Tensor], Session], oracle: LoopEngine, x: Tensor, b: Batch) -> None:
    """Gradient, loss and buffers of an engine's session and the oracle agree, and the gradient of buffers is zero."""
    x1, x2 = copy_of(x), copy_of(x)
    g1, loss1 = gradient(oracle, x1, b)
    g2, loss2 = session(x2).gradient(b, torch.full_like(x, float("nan")))
    assert close(g1, g2) and close(loss1, loss2) and close(x1, x2)
    assert not g2[:, oracle.layout.num_trainable :].any()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("use_tape", [True, False], ids=["tape", "vmap"])
@pytest.mark.parametrize("name", MODELS)
def test_stacked_equals_the_loop_on_every_model(name: str, use_tape: bool, padded: bool) -> None:
    module, layout, x0 = model(name)
    x, b = stack(layout, x0, 4), batch(name, COUNTS, padded=padded)
    engine = StackedEngine(module, layout, cross_entropy)
    check(engine.session if use_tape else without_tape(engine), LoopEngine(module, layout, cross_entropy), x, b)
    assert engine.path == ("tape" if use_tape else "vmap")


def without_tape(engine: StackedEngine) -> Callable[[Tensor], Session]:
    """Its sessions as if the module had no tape."""
    return lambda x: PlainSession(engine.untaped, x)


class InPlace(nn.Module):
    """Activations in every in-place form, one on the inputs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = (nn.Linear(6, n) for n in (6, 6, 6, K))
        self.clip, self.elu = nn.Hardtanh(-0.5, 0.5, inplace=True), nn.ELU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.elu(self.first(self.clip(x)))
        h = F.relu(self.second(h), inplace=True)
        return self.last(F.leaky_relu(self.third(h), 0.2, True))


@pytest.mark.parametrize("clients", [1, 3])
def test_in_place_activations_are_carried_and_leave_the_inputs_alone(clients: int) -> None:
    module = InPlace().double()
    layout = Layout.of_module(module)
    engine, oracle = (kind(module, layout, cross_entropy) for kind in (StackedEngine, LoopEngine))
    x = 0.5 * torch.randn(clients, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = torch.linspace(-2, 2, clients * 4 * 6, dtype=torch.float64).view(clients, 4, 6)
    targets = torch.arange(clients * 4).view(clients, 4) % K
    got = gradient(engine, x, Batch(inputs, targets))
    assert engine.path == "tape" and not engine.reads_only(inputs[0, 0])
    assert float(inputs.max()) == 2
    expected = gradient(oracle, x, Batch(inputs.clone(), targets))
    assert close(got[0], expected[0]) and close(got[1], expected[1])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_of_relu_lies_as_its_values_do_in_place_or_not(layout: torch.memory_format) -> None:
    # or the pooling before it would copy every image into its own layout
    spec = Spec(make=ReLU, name="relu", inputs=(0,), output=1, shape=(3, 4, 5), grad_in_place=True)
    op = ReLU(spec, Bound(lead=0, views={}, low=False))
    x, dy = torch.randn(2, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    op.forward(x.contiguous(memory_format=layout))
    expected = dy * (x > 0)
    (found,) = op.backward(dy)
    assert found.is_contiguous(memory_format=layout) and torch.equal(found, expected)


def test_no_gradient_of_a_strided_shortcut_writes_past_the_end_of_memory() -> None:
    # in a process of its own, whose allocator looks behind each block: channels last, torch's kernel did
    code = """
import torch
from torch import nn
from fedsim.engine import Batch, build_engine
from fedsim.params import Layout
module = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.Flatten(), nn.Linear(128, 7))
layout = Layout.of_module(module)
x = torch.randn(2, layout.size)
stacked, loop = (build_engine(name, module, layout).session(x) for name in ("stacked", "loop"))
for _ in range(50):
    b = Batch(torch.randn(2, 6, 4, 8, 8), torch.zeros(2, 6, dtype=torch.int64))
    torch.testing.assert_close(stacked.gradient(b)[0], loop.gradient(b)[0], rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "MALLOC_CHECK_": "3"})
    assert done.returncode == 0, "gradients differ, or the allocator found what was written past a block"


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_of_one_equals_the_loop(name: str) -> None:
    module, layout, x0 = model(name)
    oracle = LoopEngine(module, layout, cross_entropy)
    for b in (batch(name, [3], padded=False), rows_of(batch(name, COUNTS), 1, 2)):
        check(StackedEngine(module, layout, cross_entropy).session, oracle, stack(layout, x0, 1), b)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_its_stack_or_its_padding(name: str) -> None:
    module, layout, x0 = model(name)
    engine = build_engine("stacked", module, layout)
    x, b = stack(layout, x0, 4), batch(name, COUNTS)
    together = copy_of(x)
    g, loss = gradient(engine, together, b)
    for i, n in enumerate(COUNTS):
        if n:
            alone = copy_of(x[i : i + 1])
            g_i, loss_i = gradient(engine, alone, rows_of(b, i, n))
            assert close(g_i[0], g[i]) and close(loss_i[0], loss[i]) and close(alone[0], together[i])


@pytest.mark.parametrize("name", MODELS)
def test_a_client_without_samples_is_left_as_it_was(name: str) -> None:
    module, layout, x0 = model(name)
    x, b = stack(layout, x0, 4), batch(name, COUNTS)
    before = copy_of(x)
    loss = build_engine("stacked", module, layout).session(x).sgd_step_(b, 0.1, scale=2.0)
    assert loss is not None and loss[2] == 0
    assert torch.equal(x[2], before[2]) and not torch.equal(x[0], before[0])


@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_fused_step_is_the_gradient_and_then_the_update(name: str, clients: int) -> None:
    module, layout, x0 = model(name)
    engine = build_engine("stacked", module, layout)
    x, b = stack(layout, x0, clients), batch(name, [4, 2, 1, 3][:clients])
    n = layout.num_trainable
    shared, own = torch.randn(2, clients, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for shift in (None, shared[0], own):
        plain, fused = copy_of(x), copy_of(x)
        g, loss = gradient(engine, plain, b)
        u = 0.7 * g if shift is None else 0.7 * g + shift
        plain[:, :n] -= 0.1 * u[:, :n]
        found = engine.session(fused).sgd_step_(b, 0.1, scale=0.7, shift=shift)
        assert found is not None and close(found, loss)
        assert close(plain, fused)


def test_a_session_takes_the_same_steps_as_fresh_ones() -> None:
    module, layout, x0 = model("resnet_bn")
    engine = build_engine("stacked", module, layout)
    x = stack(layout, x0, 3)
    one, other = copy_of(x), copy_of(x)
    session = engine.session(one)
    for step in range(3):
        b = batch("resnet_bn", [4, 3, 2 + step], seed=step, step=step)
        session.sgd_step_(b, 0.1)
        engine.session(other).sgd_step_(b, 0.1)
        assert torch.equal(session.gradient(b)[0], gradient(engine, other, b)[0])
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["mlp", "char_lstm", "resnet_bn"])
def test_the_gradient_is_the_derivative_of_the_loss(name: str) -> None:
    module, layout, x0 = model(name)
    engine = build_engine("stacked", module, layout)
    x, b = stack(layout, x0, 2), batch(name, [3, 2])
    way = torch.zeros_like(x)
    n = layout.num_trainable
    way[:, :n] = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    g, _ = gradient(engine, copy_of(x), b)
    h = 1e-6
    ahead, behind = (gradient(engine, x + sign * h * way, b)[1] for sign in (1, -1))
    assert close((ahead - behind) / (2 * h), (g * way).sum(1), 1e-7)


def test_one_client_equals_plain_pytorch_training() -> None:
    module, layout, x0 = model("resnet_bn")
    module = module.double().train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = x0[None].clone()
    engine = build_engine("stacked", module, layout)
    for step in range(3):
        b = batch("resnet_bn", [6], seed=step, padded=False)
        optimizer.zero_grad()
        F.cross_entropy(module(b.inputs[0]), b.targets[0]).backward()
        optimizer.step()
        engine.session(x).sgd_step_(b, 0.1)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    expected = torch.cat([tensors[k].detach().double().flatten() for k in layout.names])
    assert close(x[0], expected)


class Functional(nn.Module):
    """A network as users write it, mostly of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding="same")
        self.conv2 = nn.Conv2d(4, 6, 3, bias=False)
        self.bn = nn.BatchNorm1d(6, momentum=None)
        self.fc = nn.Linear(6, 8)
        self.head = nn.Linear(8, 7)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = torch.tanh(self.conv2(x)) * 1.5
        x = self.bn(x.mean((2, 3)))
        x = F.gelu(self.fc(x.view(x.size(0), -1)))
        return self.head(x + x.sigmoid())


class Shared(nn.Module):
    """One layer used twice: its gradient has two parts, so no step may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 7)
        self.twice = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(torch.relu(self.twice(self.first(x.flatten(1)))))


@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("make", [Functional, Shared])
def test_a_users_module_runs_on_the_tape(make: type[nn.Module], clients: int) -> None:
    module = make()
    layout, x0 = numbers_of(module)
    engine, oracle = StackedEngine(module, layout, cross_entropy), LoopEngine(module, layout, cross_entropy)
    x, b = stack(layout, x0, clients), batch("cnn", [4, 2, 3, 4][:clients])
    check(engine.session, oracle, x, b)
    assert engine.path == "tape"
    plain, fused = copy_of(x), copy_of(x)
    plain -= 0.1 * gradient(oracle, plain, b)[0]
    engine.session(fused).sgd_step_(b, 0.1)
    assert close(plain, fused)


@pytest.mark.parametrize("loss", sorted(OF_CLASSES))  # those of numbers: tests/fedsim/tasks/test_presets.py
@pytest.mark.parametrize("name", ["mlp", "char_lstm"])
def test_any_loss_gives_the_same_on_all_paths(name: str, loss: str) -> None:
    module, layout, x0 = model(name)
    x, b = stack(layout, x0, 4), batch(name, COUNTS)
    oracle = LoopEngine(module, layout, LOSSES[loss])
    engine = StackedEngine(module, layout, LOSSES[loss])
    check(engine.session, oracle, x, b)
    check(without_tape(engine), oracle, x, b)


def test_threads_share_an_engine_and_get_the_bits_of_one_thread() -> None:
    module, layout, x0 = model("cnn")
    engine = build_engine("stacked", module, layout)
    stacks = [stack(layout, x0, 2, seed=i) for i in range(4)]
    b = batch("cnn", [4, 3])
    expected = [gradient(engine, copy_of(x), b)[0] for x in stacks]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = gradient(engine, copy_of(stacks[i]), b)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_equals_the_loop() -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, 7)
    )
    layout, x0 = numbers_of(module)
    x, b = stack(layout, x0, 4), batch("mlp", COUNTS)
    engine = CompiledEngine(module, layout, cross_entropy)
    x1, x2 = copy_of(x), copy_of(x)
    g1, loss1 = gradient(LoopEngine(module, layout, cross_entropy), x1, b)
    g2, loss2 = gradient(engine, x2, b)
    assert close(g1, g2) and close(loss1, loss2) and close(x1, x2)
    assert not engine.failed


def test_a_module_that_cannot_be_compiled_runs_stacked_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    module, layout, x0 = model("resnet_bn")
    x, b = stack(layout, x0, 2), batch("resnet_bn", [3, 2])
    engine = CompiledEngine(module, layout, cross_entropy)

    def refuse(*args: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(engine.program, "gradient", refuse)
    with pytest.warns(UserWarning, match="ResNet cannot be compiled and runs in the stacked engine.*no compiler here"):
        g, _ = gradient(engine, x, b)
    assert engine.session(x).sgd_step_(b, 0.1) is not None
    assert close(g, gradient(LoopEngine(module, layout, cross_entropy), stack(layout, x0, 2), b)[0])
