"""Keyed noise. Dropout: the same masks in every engine, for any stack width, padding or process. Whatever else a
module draws, as a variational autoencoder does: from torch's generator, seeded for one client after the other.

A copy of the module has each dropout layer replaced by one whose key is a buffer, so that an engine hands every
client its own key with the other tensors of the functional call, under vmap as well. Number i of a mask is a
function of (key, i) alone, and samples come first in a layer's input: padding behind them moves nothing.

Letters: C clients, B samples.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from fedsim.params import program_of
from fedsim.streams import _GOLDEN, Streams, mix64

_GOLDEN_INVERSE = -1018231460777725123  # _GOLDEN times this is 1 modulo 2^64
_PLAIN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_UNKEYED = (nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


def purpose(layer: str) -> str:
    """The stream that a dropout layer draws from."""
    return f"dropout/{layer}"


def keep_mask(keys: Tensor, shape: tuple[int, ...], rate: float, dtype: torch.dtype) -> Tensor:
    """[*keys.shape, *shape] of 0 (dropped, with chance `rate`) and 1 / (1 - rate), from int64 keys."""
    index = torch.arange(1, prod(shape) + 1, device=keys.device)
    # Streams' keys + index * golden, with the key inside the product: torch.compile works out a product of plain
    # indices in advance, and it would not fit its 64 bits
    place = (keys * _GOLDEN_INVERSE).unsqueeze(-1) + index
    place *= _GOLDEN
    digits = mix64(place).bitwise_right_shift_(40).bitwise_and_(0xFFFFFF)  # 24 leading bits, as Streams.uniform has it
    kept = digits >= round(rate * 2**24)
    return kept.to(dtype).mul_(1.0 / (1.0 - rate)).view(*keys.shape, *shape)


class KeyedDropout(nn.Dropout):
    """Dropout of an input [B, ...] from a key; a second call in the same forward pass draws other numbers.

    It has everything that the layer in its place had: attention modules read `self.dropout.p`.
    """

    key: Tensor

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(source.__dict__)
        self.channels = not isinstance(source, nn.Dropout)
        self.calls = 0  # in this forward pass
        self.register_buffer("key", torch.zeros((), dtype=torch.int64))

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        shape = (*input.shape[:2], *(1 for _ in input.shape[2:])) if self.channels else tuple(input.shape)
        key = self.key + self.calls
        self.calls += 1
        return input * keep_mask(key, shape, self.p, input.dtype)


def keyed_copy(module: nn.Module) -> nn.Module:
    """A copy for functional calls (`program_of`) whose dropout layers are keyed.

    Raises:
        ValueError: for a layer that draws random numbers which cannot be keyed.
    """
    module = program_of(module)
    if isinstance(module, _PLAIN):
        return KeyedDropout(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, _UNKEYED):
            raise ValueError(f"layer {name} ({type(layer).__name__}) has no keyed form; use nn.Dropout instead")
        for child_name, child in list(layer.named_children()):
            if isinstance(child, _PLAIN):
                setattr(layer, child_name, KeyedDropout(child))
    return module


def dropout_layers(module: nn.Module) -> Iterator[tuple[str, KeyedDropout]]:
    """(name, layer) of the active dropout layers of a keyed copy."""
    for name, layer in module.named_modules():
        if isinstance(layer, KeyedDropout) and layer.p > 0:
            yield name, layer


def dropout_keys(module: nn.Module, streams: Streams | None, step: int) -> dict[str, Tensor]:
    """{buffer name: [C] keys} for the functional call of a keyed copy in training mode."""
    keys = {}
    for name, _ in dropout_layers(module):
        if streams is None:
            raise ValueError(f"dropout layer {name} needs keyed noise: give the batch its streams")
        keys[f"{name}.key" if name else "key"] = streams.keys(purpose(name), step)
    return keys


def start_calls(module: nn.Module) -> None:
    """Before every forward pass: each layer's next call is its first."""
    for _, layer in dropout_layers(module):
        layer.calls = 0


class TorchNumbers:
    """Numbers that a module draws from torch's own generator, for one client's forward and backward pass.

    The generator is one for all threads, so those whose modules draw from it wait for each other.
    """

    def __init__(self) -> None:
        self._drawn: bool | None = None  # by the module; known after its first pass

    def seeds(self, streams: Streams | None, step: int, clients: int) -> list[int | None]:
        """[C], for `seeded`; None where nothing is drawn."""
        if self._drawn is False or streams is None:
            return [None] * clients
        return streams.keys("torch", step).tolist()

    @contextmanager
    def seeded(self, seed: int | None, device: torch.device) -> Iterator[None]:
        """Inside, torch draws from this seed; outside, as if nothing had been drawn."""
        if seed is None:
            yield
            return
        with _ONE_AT_A_TIME, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            before = _state(device)
            yield
            if self._drawn is None:
                self._drawn = not torch.equal(before, _state(device))


_ONE_AT_A_TIME = threading.Lock()


def _state(device: torch.device) -> Tensor:
    """Of torch's generators for the device and for the host."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return torch.cat([torch.get_rng_state(), *on_device])
