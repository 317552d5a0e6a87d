"""The end in C++: what one compiled call says of a classifier's end is what autograd says."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedsim.engine import Batch, build_engine, choose_engine, native
from fedsim.engine.head import Head
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import LOSSES, cross_entropy
from fedsim.engine.native import LastLayer
from fedsim.engine.stacked import StackedEngine, TapeSession
from fedsim.params import Layout
from fedsim.tasks.models import MODELS
from tests.fedsim.engine.zoo import gradient

pytestmark = pytest.mark.skipif(native.compiled(torch.float32) is None, reason="no C++ compiler here")
COUNTS = [9, 2, 0, 17]


class Residual(nn.Module):
    """Its ReLU reads a value that is read again: nothing may be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(30, 30), nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.relu(h + torch.relu(h)) + h)


ENDS = {
    "linear": nn.Sequential(nn.Linear(30, 7)),  # nothing before it is trained
    "relu": nn.Sequential(nn.Linear(30, 41), nn.ReLU(), nn.Linear(41, 10)),
    "two": nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2)),
    "tanh without bias": nn.Sequential(nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 17, bias=False)),
    "norm": nn.Sequential(nn.Linear(30, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 62)),
    "images": nn.Sequential(nn.Unflatten(1, (1, 5, 6)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 9)),
    "residual": Residual(),
    "narrow maker": nn.Sequential(nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 100)),
}


def problem(name: str, dtype: torch.dtype, clients: int = 4, padded: bool = True) -> tuple[nn.Module, Tensor, Batch]:
    """(module, x [C, P] with gaps between its rows, a batch padded to the longest)."""
    module = ENDS[name]
    generator = torch.Generator().manual_seed(3)
    layout = Layout.of_module(module)
    x = torch.full((clients, layout.size + 5), float("nan"), dtype=dtype)[:, 2:-3]
    x.copy_(0.3 * torch.randn(clients, layout.size, generator=generator))
    x[:, layout.num_trainable :] = 1.0  # running statistics
    most = max(COUNTS[:clients])
    inputs = torch.randn(clients, most, 30, generator=generator, dtype=dtype)
    targets = torch.randint(0, _classes(module), (clients, most), generator=generator)
    weights = (torch.arange(most) < torch.tensor(COUNTS[:clients])[:, None]).to(dtype)
    return module, x, Batch(inputs, targets, weights if padded else None)


def _classes(module: nn.Module) -> int:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1].out_features


def engines(module: nn.Module) -> tuple[StackedEngine, LoopEngine]:
    layout = Layout.of_module(module)
    return StackedEngine(module, layout, cross_entropy, native=True), LoopEngine(module, layout, cross_entropy)


def end_of(engine: StackedEngine, x: Tensor, b: Batch) -> object:
    session = TapeSession(engine, x)
    session.gradient(b)
    return session._end


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 3e-6)])
@pytest.mark.parametrize("clients", [1, 4])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ENDS)
def test_gradient_and_loss_are_those_of_autograd(
    name: str, padded: bool, clients: int, dtype: torch.dtype, bound: float
) -> None:
    module, x, b = problem(name, dtype, clients, padded)
    engine, oracle = engines(module)
    assert isinstance(end_of(engine, x.clone(), b), LastLayer)
    y = x.clone()
    inputs = b.inputs.clone()
    expected, expected_loss = gradient(oracle, y, b)
    got, loss = gradient(engine, x, b)
    assert (got - expected).abs().max() < bound and (loss - expected_loss).abs().max() < bound
    assert torch.equal(b.inputs, inputs) and torch.allclose(x, y)
    if padded and clients > 2:
        assert loss[2] == 0 and not got[2].any()


@pytest.mark.parametrize("clients", [1, 4])
def test_a_step_changes_the_parameters_by_the_gradient_at_the_old_ones(clients: int) -> None:
    module, x, b = problem("relu", torch.float64, clients)
    engine, oracle = engines(module)
    for shift in (None, torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)):
        expected = x - 0.1 * (0.7 * gradient(oracle, x, b)[0] + (0 if shift is None else shift))
        found = x.clone()
        engine.session(found).sgd_step_(b, 0.1, scale=0.7, shift=shift)
        assert torch.allclose(found, expected, atol=1e-12)


def test_a_clients_numbers_are_the_same_bits_in_any_stack_and_on_any_number_of_threads(
    set_threads: Callable[[int], None],
) -> None:
    module, x, b = problem("linear", torch.float32)
    engine, _ = engines(module)
    set_threads(1)
    together = gradient(engine, x, b)
    set_threads(2)
    threaded = gradient(engine, x, b)
    for i in (0, 1, 3):
        assert b.weights is not None
        alone = gradient(engine, x[i : i + 1], Batch(b.inputs[i : i + 1], b.targets[i : i + 1], b.weights[i : i + 1]))
        for found in (together, threaded):
            assert torch.equal(found[0][i], alone[0][0]) and torch.equal(found[1][i], alone[1][0])


def test_inputs_and_targets_may_lie_anywhere_in_memory() -> None:
    module, x, b = problem("linear", torch.float32, padded=False)
    engine, _ = engines(module)
    expected, _ = gradient(engine, x, b)
    across = Batch(b.inputs.transpose(1, 2).contiguous().transpose(1, 2), b.targets.t().contiguous().t())
    assert torch.equal(gradient(engine, x, across)[0], expected)
    one = b.inputs[:1].expand(4, -1, -1)
    got, _ = gradient(engine, x, Batch(one, b.targets))
    assert torch.equal(got, gradient(engine, x, Batch(one.contiguous(), b.targets))[0])


@pytest.mark.parametrize("size", [1, 30, 2**20])
def test_large_logits_neither_overflow_nor_lose_the_loss(size: int) -> None:
    module, x, b = problem("linear", torch.float32, padded=False)
    engine, oracle = engines(module)
    x.mul_(3).round_().mul_(size)  # whole numbers, so that sums in any order are exact
    b.inputs.round_()
    for found, expected in zip(gradient(engine, x, b), gradient(oracle, x, b), strict=True):
        assert torch.isfinite(found).all() and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_of_no_samples_has_no_loss_and_no_gradient() -> None:
    module, x, b = problem("relu", torch.float32)
    engine, _ = engines(module)
    session = TapeSession(engine, x)
    session.gradient(b)
    grad, loss = session.gradient(Batch(b.inputs[:, :0], b.targets[:, :0]))
    assert not grad.any() and loss.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["linear", "relu"])
def test_a_number_that_is_not_finite_is_seen_in_that_client_alone(name: str, bad: float) -> None:
    module, x, b = problem(name, torch.float32, padded=False)
    engine, oracle = engines(module)
    b.inputs[1, 3, 4] = bad
    grad, loss = gradient(engine, x, b)
    assert torch.isnan(gradient(oracle, x, b)[1]).tolist() == torch.isnan(loss).tolist() == [False, True, False, False]
    assert torch.isfinite(grad[[0, 2, 3]]).all() and torch.isnan(grad[1]).any()


@pytest.mark.parametrize("wrong", [-1, 7, 1 << 40])
def test_a_target_that_is_no_class_is_refused_and_nothing_changes(wrong: int) -> None:
    module, x, b = problem("linear", torch.float32)
    engine, _ = engines(module)
    before = x.clone()
    b.targets[3, 2] = wrong
    with pytest.raises(ValueError, match=f"target {wrong} is no class of a model with 7 outputs"):
        engine.session(x).sgd_step_(b, 0.1)
    assert torch.equal(x, before)


def test_values_of_another_type_or_targets_of_another_shape_are_refused() -> None:
    module, x, b = problem("linear", torch.float32, padded=False)
    engine, _ = engines(module)
    session = TapeSession(engine, x)
    session.gradient(b)
    for inputs, targets in ((b.inputs, b.targets.int()), (b.inputs, b.targets[:, :5])):
        with pytest.raises(ValueError, match="takes a class index"):
            session.gradient(Batch(inputs, targets))
    with pytest.raises(ValueError, match=r"the last layer is of torch.float32.*of torch.float64"):
        gradient(engine, x, Batch(b.inputs.double(), b.targets))


def test_other_losses_precisions_and_ends_are_left_to_the_stacked_engine() -> None:
    module, x, b = problem("relu", torch.float32)
    layout = Layout.of_module(module)
    for options in ({"loss": LOSSES["stablemax"]}, {"loss": cross_entropy, "precision": "bf16"}):
        engine, stacked = (StackedEngine(module, layout, native=native, **options) for native in (True, False))  # type: ignore[arg-type]
        assert isinstance(end_of(engine, x, b), Head)
        assert torch.equal(gradient(engine, x, b)[0], gradient(stacked, x, b)[0])
    thin = nn.Sequential(nn.Linear(30, 15), nn.ReLU(), nn.Linear(15, 3))
    wide = nn.Sequential(nn.Linear(30, 101))
    for module in (thin, wide):
        engine, _ = engines(module)
        some = Batch(b.inputs[:2], b.targets[:2] % 3)
        assert isinstance(end_of(engine, torch.zeros(2, engine.layout.size), some), Head)


def test_without_a_compiler_it_says_so_and_gives_the_stacked_engines_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, b = problem("relu", torch.float32)
    layout = Layout.of_module(module)
    monkeypatch.setattr(native, "compiled", lambda dtype: None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler works here .* runs without it"):
        engine = build_engine("stacked", module, layout, native=True)
    assert torch.equal(gradient(engine, x, b)[0], gradient(build_engine("stacked", module, layout), x, b)[0])
    assert not choose_engine(module, layout).native


def test_auto_takes_it_where_the_module_ends_so() -> None:
    def chosen(module: nn.Module, **options: object) -> bool:
        return choose_engine(module, Layout.of_module(module), **options).native  # type: ignore[arg-type]

    mlp = MODELS["mlp"]((1, 28, 28), 10)
    assert chosen(mlp) and chosen(MODELS["cnn"]((1, 28, 28), 62)) and chosen(MODELS["resnet"]((3, 32, 32), 100))
    assert not chosen(mlp, device="cuda") and not chosen(mlp, precision="bf16")
    assert not chosen(mlp, loss=LOSSES["stablemax"]) and not chosen(MODELS["mlp"]((1, 28, 28), 1000))
    assert not chosen(MODELS["char_lstm"]((20,), 80)) and not chosen(MODELS["transformer"]((20,), 80))
    assert not chosen(mlp, native=False) and not chosen(mlp, engine="loop") and chosen(mlp, engine="stacked")


def test_it_is_an_option_of_the_stacked_engine_alone() -> None:
    with pytest.raises(ValueError, match="native=true is an option of engine stacked, got engine loop"):
        choose_engine(ENDS["relu"], Layout.of_module(ENDS["relu"]), engine="loop", native=True)


def test_an_engine_sent_to_another_process_stays_what_it_is() -> None:
    engine = build_engine("stacked", ENDS["relu"], Layout.of_module(ENDS["relu"]), native=True)
    copy = pickle.loads(pickle.dumps(engine))
    assert isinstance(copy, StackedEngine) and copy.native
