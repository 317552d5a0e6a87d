"""What users write runs on the tape, with the gradients of the plain engine; what cannot, says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.engine import Batch
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import Loss, cross_entropy, masked_cross_entropy
from fedsim.engine.noise import keyed_copy
from fedsim.engine.stacked import StackedEngine
from fedsim.engine.tape import trace
from fedsim.params import Layout
from fedsim.tasks.models import init_parameters
from tests.fedsim.engine import zoo

V, T, E, K = 9, 4, 8, 5  # tokens, positions, width, classes
Forward = Callable[[Any, Tensor], Any]


class Made(nn.Module):
    """Tokens [B, T] embedded to [B, T, E], then some body, then a head on its mean over positions."""

    def __init__(self, forward: Forward, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, E), nn.Linear(E, K)
        self.body = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif part.is_floating_point():
                self.register_parameter(name, nn.Parameter(part))
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(self, self.embed(x)).mean(1))


def of(forward: Forward, **parts: Callable[[], nn.Module | Tensor]) -> Callable[[], nn.Module]:
    return lambda: Made(forward, **{name: part() for name, part in parts.items()})


def layer(make: Callable[[], nn.Module], **call: Any) -> Callable[[], nn.Module]:
    """The body is one layer."""
    return of(lambda m, x: m.layer(x, **call), layer=make)


def encoder_layer(**options: Any) -> nn.Module:
    options = {"dropout": 0.0, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(E, 2, 12, **options)


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)


def attended(m: Any, x: Tensor, **options: Any) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, E // 2)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


def attention(**options: Any) -> Callable[[], nn.Module]:
    return of(lambda m, x: attended(m, x, **options), qkv=lambda: nn.Linear(E, 3 * E))


def multihead(forward: Forward, **options: Any) -> Callable[[], nn.Module]:
    return of(forward, attn=lambda: nn.MultiheadAttention(E, 2, **options))


def scaled_in_place(m: Any, x: Tensor) -> Tensor:
    x = m.fc(x)
    x += 1
    x[:, 0] = x[:, 1].sigmoid() * 2
    return x.masked_fill_(x > 2, 0.5)


def padded_mask(m: Any, x: Tensor) -> Tensor:
    mask = x.new_zeros(T, T)
    mask[CAUSAL] = float("-inf")
    return attended(m, x, attn_mask=mask)


def without_gradient(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return part(x)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": layer(encoder_layer),
    "encoder layer, norm first, dropout": layer(lambda: encoder_layer(norm_first=True, activation="gelu", dropout=0.3)),
    "encoder layer, no bias, causal": layer(lambda: encoder_layer(bias=False), src_mask=CAUSAL, is_causal=True),
    "encoder, positions first": of(
        lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1),
        layer=lambda: nn.TransformerEncoder(encoder_layer(batch_first=False), 2, enable_nested_tensor=False),
    ),
    "decoder layer": of(
        lambda m, x: m.layer(x, 2 * x), layer=lambda: nn.TransformerDecoderLayer(E, 2, 12, 0.0, batch_first=True)
    ),
    "multihead": multihead(lambda m, x: m.attn(x, x, x)[0], batch_first=True),
    "multihead, dropout": multihead(lambda m, x: m.attn(x, x, x)[0], batch_first=True, dropout=0.4),
    "multihead, positions first": multihead(lambda m, x: m.attn(*3 * [x.transpose(0, 1)])[0].transpose(0, 1)),
    "multihead, masks": multihead(
        lambda m, x: m.attn(x, x, x, key_padding_mask=x[..., 0] > 9, attn_mask=CAUSAL, need_weights=False)[0],
        batch_first=True,
    ),
    "multihead, other keys": multihead(lambda m, x: m.attn(x, 2 * x[:, :3], x[:, :3])[0], batch_first=True),
    "multihead, keys of another width": multihead(
        lambda m, x: m.attn(x, x[..., :6], x[..., :5])[0], batch_first=True, kdim=6, vdim=5, add_bias_kv=True
    ),
    "multihead, its weights": multihead(lambda m, x: m.attn(x, x, x)[1] @ x, batch_first=True),
    "sdpa": attention(),
    "sdpa, causal": attention(is_causal=True, scale=0.3),
    "sdpa, mask and dropout": attention(attn_mask=~CAUSAL, dropout_p=0.3),
    "sdpa, a mask made in the pass": of(padded_mask, qkv=lambda: nn.Linear(E, 3 * E)),
    "functional dropout": of(
        lambda m, x: F.dropout(m.fc(F.dropout(x, 0.2, m.training)), 0.5), fc=lambda: nn.Linear(E, E)
    ),
    "functional dropout of channels": of(
        lambda m, x: F.dropout1d(m.fc(x), 0.5, m.training, inplace=True), fc=lambda: nn.Linear(E, E)
    ),
    "dropout that nobody reads": of(
        lambda m, x: [m.drop(x), F.dropout1d(x), m.fc(F.dropout(m.drop(x)))][-1],
        drop=lambda: nn.Dropout(0.5),
        fc=lambda: nn.Linear(E, E),
    ),
    "positions by arange": of(lambda m, x: x + m.places(torch.arange(x.shape[1])), places=lambda: nn.Embedding(T, E)),
    "positions of a buffer": of(
        lambda m, x: x + m.places(m.order[: x.size(1)]),
        places=lambda: nn.Embedding(6, E),
        order=lambda: torch.arange(6),
    ),
    "a learned token in front": of(
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1), token=lambda: torch.randn(1, 1, E)
    ),
    "rms norm by hand": of(
        lambda m, x: m.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), scale=lambda: torch.ones(E)
    ),
    "rms norm": layer(lambda: nn.RMSNorm(E)),
    "layer norm without shift": layer(lambda: nn.LayerNorm([T, E], bias=False)),
    "activations": of(
        lambda m, x: F.silu(F.gelu(x, approximate="tanh")) + F.softplus(m.act(x)).clamp(max=2), act=lambda: nn.Mish()
    ),
    "einsum and slices": of(
        lambda m, x: torch.einsum("bte,bse->bts", x, m.fc(x)[:, ::2]) @ x[:, 1:3], fc=lambda: nn.Linear(E, E)
    ),
    "stack, split, gather": of(
        lambda m, x: torch.stack(m.fc(x).split(4, -1), 2).flatten(2).gather(1, torch.zeros_like(x[:, :2], dtype=int)),
        fc=lambda: nn.Linear(E, E),
    ),
    "the last of each sample": of(
        lambda m, x: m.fc(x)[torch.arange(len(x)), (x[:, :, 0] > 0).sum(1).clamp(max=T - 1)].unsqueeze(1),
        fc=lambda: nn.Linear(E, E),
    ),
    "weights of a function": of(lambda m, x: F.linear(x, F.normalize(m.w)) @ m.w.tril(), w=lambda: torch.eye(E) + 0.1),
    "a convolution along positions": of(lambda m, x: m.conv(x.mT).mT, conv=lambda: nn.Conv1d(E, E, 3, padding=1)),
    "gru": of(lambda m, x: m.gru(x)[0], gru=lambda: nn.GRU(E, E, 2, batch_first=True)),
    "gru, its last state": of(lambda m, x: m.gru(x)[1].transpose(0, 1), gru=lambda: nn.GRU(E, E, batch_first=True)),
    "gru, positions first, no bias": of(
        lambda m, x: m.gru(x.transpose(0, 1))[0].transpose(0, 1), gru=lambda: nn.GRU(E, E, bias=False)
    ),
    "lstm, positions first": of(
        lambda m, x: m.lstm(x.transpose(0, 1))[0].transpose(0, 1), lstm=lambda: nn.LSTM(E, E, 2)
    ),
    "tied weights": of(lambda m, x: F.linear(F.linear(x, m.embed.weight), m.embed.weight.mT)),
    "in place": of(scaled_in_place, fc=lambda: nn.Linear(E, E)),
    "no_grad": of(lambda m, x: m.fc(x) * without_gradient(m.fc, x), fc=lambda: nn.Linear(E, E)),
    "no gradient": of(lambda m, x: m.fc(x) * m.fc(x).detach().sigmoid(), fc=lambda: nn.Linear(E, E)),
}


class Outputs(nn.Module):
    """A dictionary in, and some form of outputs."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.head, self.form = nn.Embedding(V, E), nn.Linear(E, V), form
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return self.form(self.head(self.embed(ids) * mask.unsqueeze(-1)))


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda z: (z, None),
    "dictionary": lambda z: {"loss": None, "logits": z},
}


@dataclass(frozen=True)
class Problem:
    """A module, x [C, P] and a batch whose clients have 3, 2, 1, 3, ... samples, or all 3."""

    module: nn.Module
    x: Tensor
    batch: Batch
    loss: Loss = cross_entropy

    def engines(self) -> tuple[StackedEngine, LoopEngine]:
        layout = Layout.of_module(self.module)
        return StackedEngine(self.module, layout, self.loss), LoopEngine(self.module, layout, self.loss)


def problem(make: Callable[[], nn.Module], clients: int, padded: bool = True) -> Problem:
    module, x0 = init_parameters(make, seed=1)
    x = zoo.stack(Layout.of_module(module), x0.double(), clients)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randint(V, (clients, 3, T), generator=generator)
    targets = torch.randint(K, (clients, 3), generator=generator)
    counts = torch.tensor([3, 2, 1])[torch.arange(clients) % 3]
    weights = (torch.arange(3) < counts[:, None]).double() if padded else None
    return Problem(module.double(), x, Batch(inputs, targets, weights, zoo.streams(clients)))


@pytest.mark.parametrize("clients", [1, 3, 16])
@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_the_plain_engine(name: str, clients: int) -> None:
    # a module that has positions in front numbers its noise by them, so padding moves it
    p = problem(MODULES[name], clients, padded="first" not in name)
    engine, oracle = p.engines()
    found, loss = zoo.gradient(engine, zoo.copy_of(p.x), p.batch)
    assert engine.path == "tape", engine.reason
    expected, expected_loss = zoo.gradient(oracle, zoo.copy_of(p.x), p.batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-11)
    stepped = zoo.copy_of(p.x)
    engine.session(stepped).sgd_step_(p.batch, 0.1)
    n = engine.layout.num_trainable
    torch.testing.assert_close(stepped[:, :n], (p.x - 0.1 * expected)[:, :n], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clients", [1, 3])
def test_batchnorm_keeps_its_statistics_where_nobody_reads_what_it_gives(clients: int) -> None:
    p = problem(of(lambda m, x: (m.norm(x.mT), x)[1], norm=lambda: nn.BatchNorm1d(E)), clients)
    engine, oracle = p.engines()
    ours, theirs = zoo.copy_of(p.x), zoo.copy_of(p.x)
    torch.testing.assert_close(zoo.gradient(engine, ours, p.batch)[0], zoo.gradient(oracle, theirs, p.batch)[0])
    assert engine.path == "tape", engine.reason
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, p.x)


@pytest.mark.parametrize("name", [name for name in MODULES if "dropout" not in name])
def test_weighted_sums_are_those_of_single_samples(name: str) -> None:
    p = problem(MODULES[name], 2)
    engine, oracle = p.engines()
    layout, expected = engine.layout, torch.zeros_like(p.x)
    for i, count in enumerate((3, 2)):
        for j in range(count):
            one = zoo.rows_of(p.batch, i, 3)
            one = Batch(one.inputs[:, j, None], one.targets[:, j, None], None, one.streams)
            g = layout.views(zoo.gradient(oracle, p.x[i, None].clone(), one)[0][0])
            for k, (own, view) in enumerate(zip(g.values(), layout.views(expected[i]).values(), strict=True)):
                view += (k + 1) / (1 + own.square().sum()) * own
    found = engine.session(p.x).weighted_sum(p.batch, lambda n: torch.arange(1, n.shape[-1] + 1) / (1 + n))
    assert found is not None
    torch.testing.assert_close(found[0], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_dictionaries_go_in_and_out_and_labels_may_be_ignored(form: str, clients: int) -> None:
    module, x0 = init_parameters(lambda: Outputs(FORMS[form]), seed=1)
    x, generator = zoo.stack(Layout.of_module(module), x0.double(), clients), torch.Generator().manual_seed(2)
    ids = torch.randint(V, (clients, 3, T), generator=generator)
    targets = torch.where(ids > 2, ids, -100)
    p = Problem(module.double(), x, Batch({"ids": ids, "mask": (ids > 4).double()}, targets), masked_cross_entropy)
    engine, oracle = p.engines()
    found, loss = zoo.gradient(engine, zoo.copy_of(x), p.batch)
    assert engine.path == "tape", engine.reason
    expected, expected_loss = zoo.gradient(oracle, zoo.copy_of(x), p.batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-11)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "samples that see each other": (of(lambda m, x: x - x.mean(0)), "does not keep samples apart"),
    "a sample's place in its batch": (of(lambda m, x: x * torch.arange(len(x)).view(-1, 1, 1)), "keep samples apart"),
    "a look at the data": (of(lambda m, x: x if x.sum() > 0 else -x), "looks at its data .__bool__"),
    "noise without a key": (of(lambda m, x: x + torch.rand_like(x)), "or is random"),
    "dropout in no_grad": (of(lambda m, x: x + without_gradient(F.dropout, x)), "dropout runs in no_grad"),
    "a layer in no_grad": (
        of(lambda m, x: x + without_gradient(m.norm, x.mT).mT, norm=lambda: nn.BatchNorm1d(E)),
        "norm runs in no_grad",
    ),
    "a function that torch cannot batch": (
        of(lambda m, x: m.rnn(x)[0], rnn=lambda: nn.RNN(E, E, batch_first=True)),
        "Batching rule not implemented for aten::rnn_tanh",
    ),
    "one call for each sample": (of(lambda m, x: torch.stack([row + 1 for row in x])), "any number of samples"),
    "the size of the batch": (of(lambda m, x: x / len(x)), "div depends on the number of samples|keep samples apart"),
    "a view changed under its tensor": (of(lambda m, x: (x[:, 0].mul_(2), x)[1]), "changed in place under another"),
    "a buffer that changes": (of(lambda m, x: x + m.n.add_(1), n=lambda: torch.zeros(1, dtype=int)), "in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_tape_says_why(name: str) -> None:
    make, reason = REFUSED[name]
    p = problem(make, 2)
    engine, _ = p.engines()
    assert engine.tape(p.batch.inputs[0, 0], torch.float64) is None
    assert re.search(reason, engine.reason), engine.reason


class Copies(TorchDispatchMode):
    """Counts new tensors of at least so many entries."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.made = entries, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += isinstance(out, Tensor) and out.numel() >= self.entries and not func.is_view
        return out


def test_a_large_models_parameters_are_copied_once_to_record_it() -> None:
    module = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 2))
    copied = keyed_copy(module)
    with Copies(400 * 300) as copies:
        assert trace(copied, torch.zeros(400)).specs
    assert copies.made == 1
