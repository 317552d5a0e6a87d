"""Keyed dropout: masks depend on the key alone, and every engine drops the same units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim.engine import Batch, build_engine
from fedsim.engine.noise import keep_mask, keyed_copy, purpose
from fedsim.params import Layout
from tests.fedsim.engine.zoo import batch, gradient, model, numbers_of, stack, streams


def test_a_mask_is_what_the_streams_say() -> None:
    s = streams(3)
    u = s.uniform(purpose("drop"), 4, 5, step=2)
    mask = keep_mask(s.keys(purpose("drop"), 2), (4, 5), 0.25, torch.float32)
    assert torch.equal(mask, (u >= 0.25).float() / 0.75)


def test_a_unit_is_dropped_with_the_rate_and_the_mean_is_kept() -> None:
    mask = keep_mask(streams(4).keys("dropout/x"), (100, 100), 0.3, torch.float64)
    share = (mask == 0).double().mean()
    assert abs(float(share) - 0.3) < 4 * (0.3 * 0.7 / 40_000) ** 0.5
    assert torch.equal(mask.unique(), torch.tensor([0.0, 1 / (1 - 0.3)], dtype=torch.float64))


def test_padding_behind_the_samples_moves_no_mask() -> None:
    keys = streams(2).keys("dropout/x")
    assert torch.equal(keep_mask(keys, (8, 3), 0.5, torch.float32)[:, :5], keep_mask(keys, (5, 3), 0.5, torch.float32))


class Twice(nn.Module):
    """Dropout of whole channels, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.channels = nn.Dropout2d(0.5)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(108, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(self.drop(self.channels(self.conv(x)).flatten(1))))


@pytest.mark.parametrize("clients", [1, 3])
def test_engines_drop_the_same_channels_and_calls_of_one_layer_differ(clients: int) -> None:
    module = Twice()
    layout, x0 = numbers_of(module)
    x, b = stack(layout, x0, clients), batch("cnn", [4, 2, 3][:clients])
    expected, _ = gradient(build_engine("loop", module, layout), x, b)
    found, _ = gradient(build_engine("stacked", module, layout), x, b)
    assert (expected - found).abs().max() < 1e-12
    keyed = keyed_copy(module).train()
    ones = torch.ones(2000, 1)
    assert 0.15 < float((keyed.drop(keyed.drop(ones)) > 0).float().mean()) < 0.35  # a quarter, not a half


def test_steps_clients_and_jobs_draw_different_masks() -> None:
    module, layout, x0 = model("mlp")
    engine = build_engine("stacked", module, layout)
    x = x0.repeat(2, 1)
    b = batch("mlp", [4, 4])
    same = Batch(b.inputs[:1].repeat(2, 1, 1, 1, 1), b.targets[:1].repeat(2, 1), None, b.streams, 0)
    g, _ = gradient(engine, x, same)
    later, _ = gradient(engine, x, Batch(same.inputs, same.targets, None, same.streams, 1))
    assert not torch.equal(g[0], g[1]) and not torch.equal(g[0], later[0])


@pytest.mark.parametrize("name", ["loop", "stacked"])
def test_dropout_without_streams_is_refused(name: str) -> None:
    module, layout, x0 = model("mlp")
    b = batch("mlp", [4, 4])
    with pytest.raises(ValueError, match="give the batch its streams"):
        gradient(build_engine(name, module, layout), x0.repeat(2, 1), Batch(b.inputs, b.targets))


def test_noise_that_cannot_be_keyed_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.AlphaDropout(0.1))
    with pytest.raises(ValueError, match="layer 1 .AlphaDropout. has no keyed form"):
        build_engine("loop", module, Layout.of_module(module))


class FunctionalDropout(nn.Module):
    """Two calls of functional dropout, one in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x.flatten(2), 0.5, self.training)
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.25 if self.training else 0.0).flatten(1)
        return self.fc(x)


@pytest.mark.parametrize("way", ["loop", "tape", "vmap"])
def test_functional_dropout_is_keyed_call_by_call(way: str) -> None:
    module = FunctionalDropout().double()
    layout, x0 = numbers_of(module)
    x, b = x0.repeat(2, 1), batch("cnn", [4, 3])
    engine = build_engine("loop" if way == "loop" else "stacked", module, layout)
    g, _ = engine.untaped(x, b) if way == "vmap" else gradient(engine, x, b)  # type: ignore[attr-defined]
    for i, n in enumerate((4, 3)):
        key = streams(2).keys(purpose("F.dropout"))[i]
        h = b.inputs[i, :n].flatten(2) * keep_mask(key, (n, 1, 64), 0.5, g.dtype)
        weights = (h @ h.mT / 8).softmax(-1) * keep_mask(key + 1, (n, 1, 1), 0.25, g.dtype)
        loss = F.cross_entropy(module.fc((weights @ h).flatten(1)), b.targets[i, :n])
        expected = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(module.parameters()))])
        assert (g[i] - expected).abs().max() < 1e-12


class Noisy(nn.Module):
    """Draws noise that is no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1) * torch.rand_like(x.flatten(1)))


def test_what_a_module_draws_from_torch_is_keyed_by_client_and_step_and_leaves_the_generator_alone() -> None:
    module = Noisy()
    layout = Layout.of_module(module)
    x, b, s = torch.zeros(3, layout.size, dtype=torch.float64), batch("cnn", [2, 2, 2]), streams(3)
    before = torch.get_rng_state()
    whole, _ = gradient(build_engine("loop", module, layout), x, b)
    assert torch.equal(before, torch.get_rng_state())
    module.double().train().load_state_dict({k: torch.zeros_like(v) for k, v in module.state_dict().items()})
    for i, key in enumerate(s.keys("torch", b.step).tolist()):
        with torch.random.fork_rng([]):
            torch.manual_seed(key)
            module.zero_grad()
            torch.nn.functional.cross_entropy(module(b.inputs[i]), b.targets[i]).backward()
        assert module.fc.weight.grad is not None
        assert torch.allclose(layout.views(whole[i])["fc.weight"], module.fc.weight.grad, atol=1e-12)
    assert not torch.equal(whole[0], whole[1])
    later, _ = gradient(build_engine("loop", module, layout), x, replace(b, step=1))
    assert not torch.equal(whole, later)


class ReadsItsLayers(nn.Module):
    """As GPT-2 and BERT do: dropout's rate and the sizes of layers are read where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lstm = nn.BatchNorm1d(8), nn.LSTM(8, 4, batch_first=True)
        self.dropout = nn.Dropout(0.25, inplace=False)
        self.dropout.note = "kept"
        self.last = nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.dropout, nn.Dropout) and not self.dropout.inplace and self.dropout.note == "kept"
        x = self.norm(x.view(-1, self.lstm.input_size, self.norm.num_features).mT).mT * (1 - self.dropout.p)
        return self.last(self.dropout(self.lstm(x)[0][:, -1] / self.lstm.hidden_size))


@pytest.mark.parametrize("name", ["loop", "stacked"])
def test_what_takes_a_layers_place_keeps_its_attributes(name: str) -> None:
    module = ReadsItsLayers()
    layout, x0 = numbers_of(module)
    x, b = x0.repeat(2, 1), batch("cnn", [4, 3])
    g, _ = gradient(build_engine(name, module, layout), x, b)
    mask = keep_mask(streams(2).keys(purpose("dropout"))[0], (4, 4), 0.25, g.dtype)
    module.double().dropout.register_forward_hook(lambda layer, args, out: args[0] * mask)
    torch.nn.functional.cross_entropy(module.train()(b.inputs[0]), b.targets[0]).backward()
    for k, p in module.named_parameters():
        assert p.grad is not None and (p.grad - layout.views(g[0])[k]).abs().max() < 1e-12
