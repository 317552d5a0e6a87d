"""Small members of the model zoo, and stacks of clients whose batches are padded to different lengths."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fedsim.engine import Batch, Engine
from fedsim.params import Layout
from fedsim.streams import Streams
from fedsim.tasks.models import MODELS, init_parameters

T, K = 5, 7
SEQUENCES = ("char_lstm", "transformer")
OPTIONS: dict[str, dict[str, object]] = {
    "mlp": {"hidden": [9, 6], "dropout": 0.4},
    "cnn": {"dropout": 0.3},
    "resnet": {"width": 8},
    "resnet_bn": {"width": 4},
    "char_lstm": {"hidden": 6, "layers": 2, "embedding": 3},
    "transformer": {"width": 8, "heads": 2, "layers": 1, "dropout": 0.2},
}


class Deciding(nn.Module):
    """Looks at its data: no batched program can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x.flatten(1))
        return x if float(x.detach().sum()) > 0 else -x


class Drawing(nn.Module):
    """Draws from torch's own generator while it trains, so it runs in the loop engine, one client after the other."""

    def __init__(self, num_classes: int = K) -> None:
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.flatten(1))
        return out + 0.1 * torch.randn_like(out) if self.training else out


def drawing(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """`Drawing` for a file's `model`."""
    return Drawing(num_classes)


def model(name: str, *, dropout: bool = True) -> tuple[nn.Module, Layout, Tensor]:
    """(module, layout, x0 [P] float64)."""
    shape = (T,) if name in SEQUENCES else (1, 8, 8)
    module, x0 = init_parameters(partial(MODELS[name], shape, K, **OPTIONS.get(name, {})), seed=1)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout) and not dropout:
            layer.p = 0.0
    return module, Layout.of_module(module), x0.double()


def numbers_of(module: nn.Module) -> tuple[Layout, Tensor]:
    """(layout, the module's own parameters and buffers [P] float64)."""
    return Layout.of_module(module), init_parameters(lambda: module, seed=0)[1].double()


def stack(layout: Layout, x0: Tensor, clients: int, seed: int = 0) -> Tensor:
    """[C, P] float64 whose rows differ and do not touch: a view of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((clients, layout.size + 5), float("nan"), dtype=torch.float64)[:, 2:-3]
    x.copy_(x0)
    n = layout.num_trainable
    x[:, :n] += 0.05 * torch.randn(clients, n, generator=generator, dtype=torch.float64)
    return x


def copy_of(x: Tensor) -> Tensor:
    """The same numbers, rows apart again."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype)
    return wide[:, 2:-3].copy_(x)


def batch(name: str, counts: list[int], *, seed: int = 0, padded: bool = True, step: int = 0) -> Batch:
    """A batch for clients with so many samples each, padded to the longest with numbers that must not matter."""
    generator = torch.Generator().manual_seed(seed)
    rows = (len(counts), max(counts))
    sample = (T,) if name in SEQUENCES else (1, 8, 8)
    if name in SEQUENCES:
        inputs = torch.randint(0, K, (*rows, *sample), generator=generator)
        targets = torch.randint(0, K, (*rows, T), generator=generator)
    else:
        inputs = torch.randn(*rows, *sample, generator=generator, dtype=torch.float64)
        targets = torch.randint(0, K, rows, generator=generator)
    weights = (torch.arange(rows[1]) < torch.tensor(counts)[:, None]).double()
    return Batch(inputs, targets, weights if padded else None, streams(len(counts)), step)


def streams(clients: int) -> Streams:
    return Streams(3, torch.arange(clients) + 10, torch.zeros(clients, dtype=torch.int64))


def rows_of(b: Batch, i: int, n: int) -> Batch:
    """Client i alone with its first n samples, not padded."""
    streams_i = None if b.streams is None else b.streams.rows([i])
    return Batch(b.inputs[i : i + 1, :n], b.targets[i : i + 1, :n], None, streams_i, b.step)


def gradient(engine: Engine, x: Tensor, b: Batch) -> tuple[Tensor, Tensor]:
    """(gradient [C, P], loss [C]) of a fresh session."""
    return engine.session(x).gradient(b)
