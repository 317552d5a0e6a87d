"""What is frozen: one copy for all clients of a stack, without gradient, and the same in every engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim.engine import Batch, Engine, build_engine, choose_engine
from fedsim.engine.losses import cross_entropy
from fedsim.engine.low_rank import chain_of
from fedsim.engine.stacked import StackedEngine
from fedsim.optim import build
from fedsim.params import Layout
from fedsim.tasks.adapted import Lora, adapted
from fedsim.tasks.models import init_parameters
from tests.fedsim.engine.zoo import streams

V, T, K, E = 20, 6, 3, 16
LORA = Lora(targets=("*.query", "*.value"), rank=2, alpha=6.0)


class Encoder(nn.Module):
    """A BERT in small: tokens and positions, a block of attention, the mean over positions."""

    def __init__(self, tied: bool = False, norm: bool = False, dropout: float = 0.0, width: int = E) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.places = nn.Embedding(T, width)
        self.register_buffer("order", torch.arange(T), persistent=False)
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value", "out")})
        self.norm, self.statistics = nn.LayerNorm(width), nn.BatchNorm1d(width) if norm else nn.Identity()
        self.up, self.down, self.drop = nn.Linear(width, 32), nn.Linear(32, width), nn.Dropout(dropout)
        self.classifier = nn.Linear(width, V if tied else K)
        if tied:
            self.classifier.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.places(self.order)
        q, k, v = (self.attention[name](h) for name in ("query", "key", "value"))
        h = self.norm(h + self.attention["out"]((q @ k.mT / 4).softmax(-1) @ v))
        h = self.statistics(h.mean(1) + self.down(self.drop(F.gelu(self.up(h)))).mean(1))
        return self.classifier(h)


def made(train: Sequence[str] = (), lora: Lora | None = None, dtype: torch.dtype = torch.float64, **options: object):
    """(module, layout, x0 [P]) of an encoder of which only a part trains."""
    module, x0 = init_parameters(lambda: adapted(Encoder(**options), train, lora), seed=3)  # type: ignore[arg-type]
    return module.to(dtype), Layout.of_module(module), x0.to(dtype)


def batch(clients: int, padded: bool = False, seed: int = 0, samples: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, V, (clients, samples, T), generator=generator)
    targets = torch.randint(0, K, (clients, samples), generator=generator)
    counts = torch.tensor([samples, 2, 0, 3])[torch.arange(clients) % 4]
    weights = (torch.arange(samples) < counts[:, None]).float() if padded else None
    return Batch(inputs, targets, weights, streams(clients), seed)


def spread(x0: Tensor, clients: int, layout: Layout, seed: int = 0) -> Tensor:
    """[C, P]: every client somewhere else."""
    x = x0.repeat(clients, 1)
    noise = torch.randn(clients, layout.num_trainable, generator=torch.Generator().manual_seed(seed)).to(x0)
    x[:, : layout.num_trainable] += 0.1 * noise
    return x


CASES = {
    "head": {"train": ["classifier.*"]},
    "bias": {"train": ["*.bias"]},
    "tied and trained": {"train": ["embed.*"], "tied": True},
    "tied and frozen": {"train": ["attention.*"], "tied": True},
    "adapters": {"lora": LORA},
    "adapters with dropout": {"lora": Lora(targets=("*.query",), dropout=0.5), "dropout": 0.3},
    "statistics that stay": {"train": ["classifier.*"], "norm": True, "dropout": 0.3},
    "statistics that move": {"train": ["statistics.*"], "norm": True},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_engines_agree(case: str, padded: bool) -> None:
    module, layout, x0 = made(**CASES[case])  # type: ignore[arg-type]
    engine, oracle = StackedEngine(module, layout, cross_entropy), build_engine("loop", module, layout)
    x1, x2, b = spread(x0, 4, layout), spread(x0, 4, layout), batch(4, padded)
    g1, loss1 = oracle.session(x1).gradient(b)
    g2, loss2 = engine.session(x2).gradient(b)
    assert engine.path == "vmap"
    for one, two in ((g1, g2), (loss1, loss2), (x1, x2)):
        assert (one - two).abs().max() < 1e-12
    assert g1.abs().sum() > 0
    assert torch.equal(engine.logits(x1[0], b.inputs[0]), oracle.logits(x1[0], b.inputs[0]))


def test_statistics_of_a_frozen_layer_stay_and_are_those_that_it_uses() -> None:
    module, layout, x0 = made(["classifier.*"], norm=True)
    assert layout.num_buffers == 0 and layout.names == ("classifier.weight", "classifier.bias")
    module.statistics.running_mean.fill_(0.7)
    engine, b = build_engine("stacked", module, layout), batch(3)
    g, _ = engine.session(spread(x0, 3, layout)).gradient(b)
    assert module.statistics.running_mean.eq(0.7).all() and module.training
    alone = copy.deepcopy(module).eval()  # as in evaluation: nothing else in this model knows training
    for i, row in enumerate(spread(x0, 3, layout)):
        tensors = {k: v.clone().requires_grad_() for k, v in layout.views(row).items()}
        loss = F.cross_entropy(functional_call(alone, tensors, (b.inputs[i],)), b.targets[i])
        expected = torch.cat([p.flatten() for p in torch.autograd.grad(loss, list(tensors.values()))])
        assert (g[i] - expected).abs().max() < 1e-12
    moving = Layout.of_module(made(["statistics.bias"], norm=True)[0])
    assert moving.names[1:] == tuple(f"statistics.{k}" for k in ("running_mean", "running_var", "num_batches_tracked"))


def merged_loss(base: nn.Module, tensors: dict[str, Tensor], inputs: Tensor, targets: Tensor, lora: Lora) -> Tensor:
    """The loss of a plain encoder whose weights are W + (alpha / R) B A: no adapter, no stack."""
    weights = {k: v for k, v in tensors.items() if "lora" not in k}
    for name in {k.rpartition(".")[0] for k in tensors if "lora" in k}:
        low = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        weights[f"{name}.weight"] = base.get_parameter(f"{name}.weight") + lora.alpha / lora.rank * low
    return F.cross_entropy(functional_call(base, weights, (inputs,)), targets)


@pytest.mark.parametrize("clients", [1, 3, 16])
def test_a_stack_of_adapters_equals_its_clients_one_by_one(clients: int) -> None:
    """Forward, gradient, and where five steps of AdamW lead, in float32, beside merged weights and torch's AdamW."""
    module, layout, x0 = made(["classifier.*"], LORA, torch.float32)
    base = init_parameters(Encoder, seed=3)[0].requires_grad_(False)
    x = spread(x0, clients, layout)
    optimizer = build({"name": "adamw", "lr": 0.01, "weight_decay": 0.1, "decay_vectors": True}, layout)
    leaves = [{k: v.clone().requires_grad_() for k, v in layout.views(row).items()} for row in x]
    twins = [torch.optim.AdamW(list(own.values()), 0.01, weight_decay=0.1) for own in leaves]
    engine, state = build_engine("stacked", module, layout), optimizer.init(x)
    session = engine.session(x)
    for step in range(5):
        b = batch(clients, seed=step)
        grad, loss = session.gradient(b)
        for i, (own, twin) in enumerate(zip(leaves, twins, strict=True)):
            twin.zero_grad()
            expected = merged_loss(base, own, b.inputs[i], b.targets[i], LORA)
            expected.backward()
            assert abs(loss[i] - expected) < 1e-5
            found = torch.cat([p.grad.flatten() for p in own.values()])  # type: ignore[union-attr]
            assert (grad[i] - found).abs().max() < 1e-5
            twin.step()
        optimizer.step_(x, grad, state)
    after = torch.stack([torch.cat([p.detach().flatten() for p in own.values()]) for own in leaves])
    assert (x - after).abs().max() < 1e-5 and (x - spread(x0, clients, layout)).abs().max() > 0.01


class Storage(TorchDispatchMode):
    """Adds up the bytes of all that operations make; views and what is written in place make nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        given, made = (
            {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes()
                for t in tree_leaves(tree)
                if isinstance(t, Tensor)
            }
            for tree in ((args, kwargs), out)
        )
        self.bytes += sum(size for storage, size in made.items() if storage not in given)
        return out


def bytes_of_a_client(width: int) -> float:
    """What one more client adds to the storage of a stack's gradient."""
    module, layout, x0 = made((), LORA, torch.float32, width=width)
    engine, counted = StackedEngine(module, layout, cross_entropy), []
    for clients in (4, 12):
        session, b = engine.session(spread(x0, clients, layout)), batch(clients, samples=1)
        session.gradient(b)
        with Storage() as storage:
            session.gradient(b)
        counted.append(storage.bytes)
    assert engine.path == "vmap" and layout.size == 4 * 2 * width
    return (counted[1] - counted[0]) / 8


def test_a_stack_grows_with_adapters_and_not_with_the_base() -> None:
    """Layers twice as wide have adapters and activations twice as large, and frozen weights four times."""
    small, large = bytes_of_a_client(256), bytes_of_a_client(512)
    assert 4 * 4 * 2 * 256 < small and 1.8 < large / small < 2.05


def test_the_rule_sees_what_trains() -> None:
    frozen, whole = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 10)), []
    for module in (frozen, copy.deepcopy(frozen)):
        if module is frozen:
            module[0].requires_grad_(False)
        plan = choose_engine(module, Layout.of_module(module), num_clients=1000)
        whole.append((plan.width, plan.native))
    assert whole[0] == (16, False) and whole[1][0] == 1
    chain = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert chain_of(chain) is not None and chain_of(adapted(chain, ["3.*"], None)) is None


def test_a_gpu_counts_the_frozen_layers_at_every_position() -> None:
    module, layout, _ = made((), LORA, width=256)
    widths = [
        choose_engine(module, layout, device="cuda", batch_size=256, num_clients=10_000, sample=sample).width
        for sample in (None, torch.zeros(100, dtype=torch.int64))
    ]
    assert widths[0] > 10 * widths[1] > 10


def test_one_module_serves_all_threads_and_engines() -> None:
    module, layout, _ = made(["classifier.*"])
    engine: Engine = build_engine("stacked", module, layout)
    assert isinstance(engine, StackedEngine)
    copies = [engine.loop.modules.get(True), engine.vmapped.modules.get(True), engine.module]
    assert all(m.embed.weight is module.embed.weight for m in copies)  # type: ignore[union-attr]
