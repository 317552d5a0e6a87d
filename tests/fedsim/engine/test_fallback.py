"""Modules that the tape or vmap cannot carry still train, and say so once."""

from __future__ import annotations

import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedsim.engine import ENGINES, build_engine
from fedsim.engine.losses import cross_entropy
from fedsim.engine.stacked import StackedEngine
from fedsim.engine.tape import trace
from fedsim.engine.twins import PlainRecurrent, batchable_copy
from fedsim.params import Layout
from tests.fedsim.engine.zoo import Deciding, batch, gradient, model, numbers_of, stack


class Untraceable(Deciding):
    """Known to no tape, but vmap can carry it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(row.flatten()) for row in x])


def test_a_module_that_cannot_be_batched_runs_in_the_loop_with_one_warning() -> None:
    module = Deciding()
    layout, x0 = numbers_of(module)
    x, b = stack(layout, x0, 3), batch("cnn", [4, 2, 3])
    engine = build_engine("stacked", module, layout)
    session = engine.session(x)
    assert session.sgd_step_(b, 0.1) is None
    with pytest.warns(UserWarning, match="Deciding cannot be batched over clients and runs in the loop engine"):
        g, _ = session.gradient(b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = gradient(engine, x, b)
    assert torch.equal(g, again) and torch.equal(g, gradient(build_engine("loop", module, layout), x, b)[0])
    assert isinstance(engine, StackedEngine) and engine.path == "loop"


def test_an_untraceable_module_is_vmapped_without_a_warning() -> None:
    module = Untraceable()
    layout, x0 = numbers_of(module)
    x, b = stack(layout, x0, 3), batch("cnn", [4, 2, 3])
    engine = StackedEngine(module, layout, cross_entropy)
    g, _ = gradient(engine, x, b)
    assert engine.path == "vmap"
    assert (g - gradient(build_engine("loop", module, layout), x, b)[0]).abs().max() < 1e-12


def test_a_users_error_is_not_taken_for_a_module_that_cannot_be_batched() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(63, 7))  # the samples have 64 numbers
    layout = Layout.of_module(module)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied|size mismatch"):
        gradient(build_engine("stacked", module, layout), torch.zeros(2, layout.size).double(), batch("cnn", [2, 2]))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_written_out_recurrent_layers_are_torchs(kind: type[nn.LSTM | nn.GRU], batch_first: bool) -> None:
    layer = kind(3, 4, num_layers=2, batch_first=batch_first).double()
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    for found, expected in zip(tree_leaves(PlainRecurrent(layer)(x)), tree_leaves(layer(x)), strict=True):
        assert (found - expected).abs().max() < 1e-12


class Residual(nn.GRU):
    """Has a forward pass of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, last = super().forward(x)
        return x + y, last


def test_a_layer_that_derives_from_a_recurrent_one_keeps_its_own_forward_pass() -> None:
    layer, x = Residual(4, 4, batch_first=True).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    for found, expected in zip(batchable_copy(layer)(x), layer(x), strict=True):
        assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_travels_by_pickle(name: str) -> None:
    module, layout, x0 = model("logistic")
    engine = build_engine(name, module, layout)
    b = batch("logistic", [3, 2])
    x = x0.repeat(2, 1)
    if name != "compiled":
        gradient(engine, x, b)
    copy = pickle.loads(pickle.dumps(engine))
    assert copy.name == name
    assert torch.equal(copy.logits(x[0], b.inputs[0]), engine.logits(x[0], b.inputs[0]))


def test_bad_names_are_answered_with_the_known_ones() -> None:
    module, layout, _ = model("logistic")
    with pytest.raises(
        ValueError, match="engine must be one of loop, stacked, compiled, or pkg.module:name, got 'fast'"
    ):
        build_engine("fast", module, layout)
    with pytest.raises(ValueError, match="precision must be one of fp32, tf32, bf16, got 'fp64'"):
        build_engine("loop", module, layout, precision="fp64")
    with pytest.raises(ValueError, match="loss must be one of cross_entropy, .*huber.* or a function, got 'l2'"):
        build_engine("loop", module, layout, "l2")


def test_building_leaves_the_users_module_alone() -> None:
    module, layout, _ = model("mlp")
    kinds = [type(layer) for layer in module.modules()]
    training = module.training
    build_engine("stacked", module, layout)
    assert [type(layer) for layer in module.modules()] == kinds and module.training == training


def test_other_threads_run_modules_while_one_is_traced() -> None:
    other, found = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), []

    class Slow(nn.Module):
        """Another thread has its turn in the midst of this module's trace."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(other, torch.ones(4, 3)).result())
            return self.layer(x)

    tape = trace(Slow(), torch.zeros(3))
    assert [spec.name for spec in tape.specs] == ["layer"]
    assert torch.equal(found[0], other(torch.ones(4, 3)))
