"""The model zoo: plain `nn.Module`s with torch's default initialisation, and keyed initial parameters.

A factory takes the shape of one sample and the number of classes, then its own typed options by name; a user's own
factory enters the same way, by import path. Sequence models read `input_shape = (T,)` class indices and return
logits [B, T, V]; the others return logits [B, K].

Letters: B samples, T positions, V vocabulary, K classes, E width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from math import prod, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from fedsim.params import Layout

Factory = Callable[..., nn.Module]


def logistic(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Multinomial logistic regression: one linear layer on the flattened sample."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), num_classes))


def mlp(
    input_shape: Sequence[int], num_classes: int, *, hidden: Sequence[int] = (200,), dropout: float = 0.0
) -> nn.Module:
    """Fully connected layers with ReLU; hidden=[200] by default, optional dropout.

    Args:
        hidden: width of each hidden layer.
        dropout: share of each hidden layer's outputs that training drops.
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"mlp.hidden must list positive widths, got {list(hidden)}")
    layers: list[nn.Module] = [nn.Flatten()]
    width = prod(input_shape)
    for next_width in hidden:
        layers += [nn.Linear(width, next_width), nn.ReLU(), *_dropout("mlp", dropout)]
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def cnn(input_shape: Sequence[int], num_classes: int, *, dropout: float = 0.0) -> nn.Module:
    """LEAF's two-layer CNN: conv5x5x32, pool, conv5x5x64, pool, dense 512; 1,663,370 parameters on 28x28.

    Args:
        dropout: share of the dense layer's outputs that training drops.
    """
    channels, height, width = _image("cnn", input_shape, smallest=4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        *_dropout("cnn", dropout),
        nn.Linear(512, num_classes),
    )


def resnet(
    input_shape: Sequence[int], num_classes: int, *, width: int = 16, blocks: int = 1, stages: int = 3
) -> nn.Module:
    """Residual network with GroupNorm: stages of `blocks` blocks, widths 1, 2, 4, ... times `width`.

    ResNet-18 is width 64, 2 blocks, 4 stages.

    Args:
        width: channels of the first stage; a multiple of 8, or less.
        blocks: of two convolutions each, a stage.
        stages: each later one halves the picture and doubles the channels.
    """
    if width < 1 or (width > 8 and width % 8):
        raise ValueError(f"resnet.width must be a multiple of 8, or less than 8, got {width}")
    channels, _, _ = _image("resnet", input_shape, 4)
    return ResNet(channels, num_classes, width, blocks, stages, lambda n: nn.GroupNorm(min(8, n), n))


def resnet_bn(
    input_shape: Sequence[int], num_classes: int, *, width: int = 16, blocks: int = 1, stages: int = 3
) -> nn.Module:
    """The same residual network with BatchNorm, whose running statistics travel with the parameters.

    Args:
        width: channels of the first stage.
        blocks: of two convolutions each, a stage.
        stages: each later one halves the picture and doubles the channels.
    """
    if width < 1:
        raise ValueError(f"resnet_bn.width must be at least 1, got {width}")
    channels, _, _ = _image("resnet_bn", input_shape, 4)
    return ResNet(channels, num_classes, width, blocks, stages, nn.BatchNorm2d)


def char_lstm(
    input_shape: Sequence[int], num_classes: int, *, hidden: int = 256, layers: int = 2, embedding: int = 8
) -> nn.Module:
    """Next-character LSTM (McMahan et al. 2017): embedding 8, two layers of 256, a logit per position and character.

    Args:
        hidden: units of a layer.
        layers: of the LSTM.
        embedding: numbers that stand for a character.
    """
    _sequence("char_lstm", input_shape)
    return CharLSTM(num_classes, embedding, hidden, layers)


def transformer(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    dropout: float = 0.0,
) -> nn.Module:
    """Tiny causal transformer: learned positions, pre-norm blocks, a logit per position and token.

    Args:
        width: E, numbers that stand for a position; a multiple of `heads`.
        heads: of attention, in each block.
        layers: blocks.
        dropout: share that training drops of embeddings and of what a block adds.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"transformer.width={width} must be a multiple of heads={heads}")
    length = _sequence("transformer", input_shape)
    return Transformer(num_classes, length, width, heads, layers, _rate("transformer", dropout))


MODELS: dict[str, Factory] = {
    "logistic": logistic,
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "resnet_bn": resnet_bn,
    "char_lstm": char_lstm,
    "transformer": transformer,
}


_rng_lock = threading.Lock()


def init_parameters(factory: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Tensor]:
    """A module and its initial parameters, keyed by the seed; the global generator is left as it was.

    torch's own initialisers read the global generator and take no other, so it is seeded inside a fork.

    Returns:
        (module, flat [P] float32 in the order of `Layout.of_module(module)`, buffers last).

    >>> from functools import partial
    >>> module, flat = init_parameters(partial(logistic, (2,), 3), seed=0)
    >>> flat.shape, torch.equal(flat, init_parameters(partial(logistic, (2,), 3), seed=0)[1])
    (torch.Size([9]), True)
    """
    with _rng_lock, torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        module = factory()
    tensors, layout = dict(module.named_parameters()) | dict(module.named_buffers()), Layout.of_module(module)
    x0 = layout.flatten({k: v.detach() for k, v in tensors.items()})
    for name, view in layout.views(x0).items():
        if (tensor := tensors[name]).dtype == x0.dtype:
            tensor.data = view  # the module's own parameters would be one more copy of a large model
    return module, x0


def as_module(made: object, name: str) -> nn.Module:
    """What a factory gave, if it is a module of known sizes.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} gave a {type(made).__name__}, not a torch.nn.Module")
    for path, module in made.named_modules():
        if any(is_lazy(p) for p in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise ValueError(
                f"{path or name} is a {type(module).__name__}, whose size is not known before it sees data; use the "
                "layer that says its size (its factory is given input_shape and num_classes)"
            )
    return made


class ResNet(nn.Module):
    """He et al. 2016's basic blocks behind a 3x3 stem, for small images."""

    def __init__(
        self, channels: int, num_classes: int, width: int, blocks: int, stages: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        if min(blocks, stages) < 1:
            raise ValueError(f"resnet.blocks and resnet.stages must be at least 1, got {blocks} and {stages}")
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
        widths = [width * 2**stage for stage in range(stages) for _ in range(blocks)]
        strides = [2 if stage and not block else 1 for stage in range(stages) for block in range(blocks)]
        before = [width, *widths[:-1]]
        self.blocks = nn.Sequential(*(Block(*shape, norm) for shape in zip(before, widths, strides, strict=True)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class CharLSTM(nn.Module):
    """Characters [B, T] -> logits [B, T, V]."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0])


class Transformer(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width).normal_(std=0.02))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.embed(x) + self.positions[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TransformerBlock(nn.Module):
    """Pre-norm causal self-attention, then a GELU layer of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop1 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self.out(self.attend(self.norm1(x))))
        return x + self.drop2(self.down(F.gelu(self.up(self.norm2(x)))))

    def attend(self, x: Tensor) -> Tensor:
        """Softmax attention in which a position sees itself and those before it."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        position = torch.arange(length, device=x.device)
        later = position > position[:, None]
        scores = (q @ k.transpose(-2, -1) / sqrt(width // self.heads)).masked_fill(later, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)


def _dropout(model: str, rate: float) -> list[nn.Module]:
    return [nn.Dropout(rate)] if _rate(model, rate) else []


def _rate(model: str, rate: float) -> float:
    if not 0 <= rate < 1:
        raise ValueError(f"{model}.dropout must be at least 0 and less than 1, got {rate}")
    return rate


def _image(model: str, input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    shape = tuple(input_shape)
    if len(shape) != 3 or min(shape[1:]) < smallest:
        rule = f"images [channels, height, width] of at least {smallest}x{smallest}"
        raise ValueError(f"model {model} reads {rule}, got samples of shape {list(shape)}; use mlp or another model")
    return shape[0], shape[1], shape[2]


def _sequence(model: str, input_shape: Sequence[int]) -> int:
    if len(input_shape) != 1:
        shape = list(input_shape)
        raise ValueError(f"model {model} reads sequences [T] of class indices, got samples of shape {shape}")
    return input_shape[0]
