"""Weighted sums of samples' gradients against the plain engine, one sample after another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.engine import Batch, factors, images
from fedsim.engine.factors import Outer, Rows, outer_square_norms
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import cross_entropy
from fedsim.engine.stacked import StackedEngine
from fedsim.params import Layout
from fedsim.tasks.models import MODELS as MODEL_ZOO
from tests.fedsim.engine import zoo

K, T = 4, 6
COUNTS = [3, 1, 0, 2]
MODELS = [name for name in MODEL_ZOO if name != "resnet_bn"]


class Twice(nn.Module):
    """One layer used twice, so that a sample's gradient by it has two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.again(F.relu(self.again(self.first(x))))))


class KernelTwice(nn.Module):
    """The same for a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.last = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Linear(4 * 9, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.again(F.relu(self.again(x)))).flatten(1))


class Tokens(nn.Module):
    """An embedding, a norm and linear layers at each of T positions, then a mean over them or none."""

    def __init__(self, rows: int, width: int, *, padding: int | None = None, pooled: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, width, padding_idx=padding)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.last = nn.Linear(2 * width, K)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.wide(self.norm(self.embed(x))))
        return self.last(y.mean(1) if self.pooled else y)


def on_images(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(K))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a layer used twice": (Twice, (8,)),
    "a kernel used twice": (KernelTwice, (4, 3, 3)),
    "linear without a bias": (lambda: nn.Sequential(nn.Linear(5, 3, bias=False), nn.Tanh(), nn.Linear(3, K)), (5,)),
    "few positions, wide layers": (lambda: Tokens(9, 16), (2,)),
    "many positions, narrow layers": (lambda: Tokens(4, 3), (T,)),
    "an index that is padding": (lambda: Tokens(5, 4, padding=2, pooled=True), (T,)),
    "linear over two axes of positions": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm([2, 4]), nn.Flatten(), nn.Linear(24, K)),
        (3, 2, 3),
    ),
    "strides, dilation and groups": (
        lambda: on_images(
            nn.Conv2d(2, 6, 3, stride=2, padding=2, dilation=2, groups=2),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.GroupNorm(3, 6),
            nn.MaxPool2d(2),
        ),
        (2, 7, 9),
    ),
    "kernels larger than images": (
        lambda: on_images(nn.Conv2d(3, 8, (1, 2)), nn.ReLU(), nn.Conv2d(8, 8, 2)),
        (3, 2, 3),
    ),
    "a norm without scales": (
        lambda: on_images(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.ReLU()),
        (1, 5, 5),
    ),
}


def made(name: str) -> tuple[nn.Module, Layout, Tensor, Batch]:
    """(module, layout, x [C, P], batch padded for all but the first client)."""
    if name not in CASES:
        module, layout, x0 = zoo.model(name, dropout=False)
        return module.double(), layout, zoo.stack(layout, x0, len(COUNTS)), zoo.batch(name, COUNTS)
    factory, shape = CASES[name]
    generator = torch.Generator().manual_seed(0)
    rows = (len(COUNTS), max(COUNTS))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(1)
        module = factory().double()
        tokens = module.embed.num_embeddings if isinstance(module, Tokens) else 0
        one = torch.zeros(1, *shape, dtype=torch.int64 if tokens else torch.float64)
        shape_out = module(one).shape[1:-1]
    layout, x0 = zoo.numbers_of(module)
    inputs = (
        torch.randint(tokens, (*rows, *shape), generator=generator)
        if tokens
        else torch.randn(*rows, *shape, generator=generator, dtype=torch.float64)
    )
    targets = torch.randint(K, (*rows, *shape_out), generator=generator)
    weights = (torch.arange(rows[1]) < torch.tensor(COUNTS)[:, None]).double()
    return module, layout, zoo.stack(layout, x0, len(COUNTS)), Batch(inputs, targets, weights)


def alone(b: Batch, client: int, sample: int) -> Batch:
    return Batch(b.inputs[client, None, sample, None], b.targets[client, None, sample, None])


def weigh(norms: Tensor) -> Tensor:
    """Something that tells tensors and samples apart."""
    return torch.arange(1, norms.shape[-1] + 1).double() / (norms.sum(-1, keepdim=True).sqrt() + norms.sqrt() + 0.1)


def expected_sum(module: nn.Module, layout: Layout, x: Tensor, b: Batch) -> Tensor:
    engine, out = LoopEngine(module, layout, cross_entropy), torch.zeros_like(x)
    for i, row in enumerate(x):
        for j in range(COUNTS[i]):
            g = layout.views(zoo.gradient(engine, row[None].clone(), alone(b, i, j))[0][0])
            norms = torch.stack([g[name].square().sum() for name in layout.trainable.names])
            for name, weight in zip(layout.trainable.names, weigh(norms), strict=True):
                layout.views(out[i])[name] += weight * g[name]
    return out


@pytest.mark.parametrize("name", [*MODELS, *CASES])
def test_weights_by_norm_and_weighted_sums_are_those_of_single_samples(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, layout, x, b = made(name)
    engine, expected = StackedEngine(module, layout, cross_entropy), expected_sum(module, layout, x, b)
    found = engine.session(x).weighted_sum(b, weigh)
    assert found is not None
    total, loss = found
    assert torch.allclose(total, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(loss, zoo.gradient(engine, x.clone(), b)[1], rtol=1e-12)
    for i, n in enumerate(COUNTS):  # alone and without padding
        if n:
            one = engine.session(x[i, None]).weighted_sum(zoo.rows_of(b, i, n), weigh)
            assert one is not None and torch.allclose(one[0], expected[i, None], rtol=1e-12, atol=1e-12)
    for module_ in (factors, images):
        monkeypatch.setattr(module_, "CHUNK", 1)
    by_pieces = engine.session(x).weighted_sum(b, weigh)
    assert by_pieces is not None and torch.allclose(by_pieces[0], total, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_equal_weights_give_the_gradient_of_the_sum_with_its_dropout(name: str) -> None:
    module, layout, x0 = zoo.model(name)
    x, b = zoo.stack(layout, x0, len(COUNTS)), zoo.batch(name, COUNTS)
    engine = StackedEngine(module.double(), layout, cross_entropy)
    mean, loss = zoo.gradient(engine, x.clone(), b)
    found = engine.session(x).weighted_sum(b, torch.ones_like)
    assert found is not None
    assert torch.allclose(found[0], mean * torch.tensor(COUNTS)[:, None], rtol=1e-12, atol=1e-13)
    assert torch.allclose(found[1], loss, rtol=1e-14)


def test_a_module_without_a_tape_or_with_batch_norm_has_no_such_sum() -> None:
    for name, (module, layout, x0) in {
        "cnn": (made := zoo.Deciding(), *zoo.numbers_of(made)),
        "resnet_bn": zoo.model("resnet_bn"),
    }.items():
        session = StackedEngine(module.double(), layout, cross_entropy).session(zoo.stack(layout, x0, len(COUNTS)))
        assert session.weighted_sum(zoo.batch(name, COUNTS), weigh) is None


def test_both_ways_to_a_norm_agree() -> None:
    """Two positions ask for pairs, seven for the gradient itself; each against the gradient formed here."""
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 7):
        d = torch.randn(5, length, 4, generator=generator, dtype=torch.float64)
        a = torch.randn(5, length, 9, generator=generator, dtype=torch.float64)
        formed = torch.einsum("nto,nti->noi", d, a)
        assert torch.allclose(outer_square_norms(d, a), formed.square().sum((1, 2)), rtol=1e-12)
        assert torch.allclose(Outer(d.flatten(0, 1), a.flatten(0, 1), 5).formed()[0], formed, rtol=1e-12)


def test_norms_by_hand() -> None:
    """A sample's gradient by a weight is d a^T, here of norm 5 * 13; read twice, a row's gradients add up to 3 + 1."""
    linear = Outer(torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 12.0, 0.0]]), 1)
    assert linear.square_norms().tolist() == [[25.0 * 169.0]]
    table = Rows(torch.tensor([[[3.0], [2.0], [1.0]]]), torch.tensor([[0, 1, 0]]), 8, lead=0)
    assert table.square_norms().tolist() == [[16.0 + 4.0]]
    assert table.formed()[0, 0, :2, 0].tolist() == [4.0, 2.0]


def test_pairs_that_cancel_leave_no_negative_norm() -> None:
    d = torch.tensor([[[1e4, 1.0], [-1e4, -1.0]]]).expand(50, -1, -1) * torch.linspace(0.9, 1.1, 50)[:, None, None]
    a = torch.full((50, 2, 9), 0.7)
    assert bool((outer_square_norms(d, a) >= 0).all())
