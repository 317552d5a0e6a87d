"""Keyed noise. Dropout: the same masks in every engine, for any stack width, padding or process. Whatever else a
module draws, as a variational autoencoder does: from torch's generator, seeded for one client after the other.

A copy of the module has each dropout layer replaced by one whose key is a buffer, so that an engine hands every
client its own key with the other tensors of the functional call, under vmap as well. Number i of a mask is a
function of (key, i) alone, and samples come first in a layer's input: padding behind them moves nothing.

Letters: C clients, B samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod, sqrt
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedsim.params import program_of
from fedsim.streams import _GOLDEN, Streams, mix64

DROPOUTS = {F.dropout: False, F.dropout1d: True, F.dropout2d: True, F.dropout3d: True}
"""Functions that drop, and whether whole channels."""

FUNCTIONAL = "F.dropout"
"""What stands for the name of a layer where dropout is none."""

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


def mask_shape(shape: Sequence[int], channels: bool) -> tuple[int, ...]:
    """Of the mask for values [B, ...] of a shape: a number for each, or for each channel [B, Ch, ...] of them."""
    return (*shape[:2], *(1 for _ in shape[2:])) if channels else tuple(shape)


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
        key = self.key + self.calls
        self.calls += 1
        return input * keep_mask(key, mask_shape(input.shape, self.channels), self.p, input.dtype)


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
    """{name: [C] keys} for a pass of a keyed copy in training mode: of buffers, and of functional dropout."""
    keys = {} if streams is None else {FUNCTIONAL: streams.keys(purpose(FUNCTIONAL), step)}
    for name, _ in dropout_layers(module):
        if streams is None:
            raise ValueError(f"dropout layer {name} needs keyed noise: give the batch its streams")
        keys[f"{name}.key" if name else "key"] = streams.keys(purpose(name), step)
    return keys


def start_calls(module: nn.Module) -> None:
    """Before every forward pass: each layer's next call is its first."""
    for _, layer in dropout_layers(module):
        layer.calls = 0


class KeyedFunctions(TorchFunctionMode):
    """While it is entered, functional dropout of this thread is keyed: `F.dropout`, and that inside of attention.

    Args:
        key: of a client's forward pass, whose first, second, ... call of such a function draws other numbers.
    """

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key, self.calls = key, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return self._drop(DROPOUTS[func], *dropout_of(*args, **kwargs))
        inner = written_out(func, args, kwargs)
        if inner is None:
            return func(*args, **kwargs)
        with self:
            return inner(*args, **kwargs)

    def _drop(self, channels: bool, x: Tensor, rate: float, training: bool, inplace: bool) -> Tensor:
        if not training or rate == 0:
            return x
        mask = keep_mask(self.key + self.calls, mask_shape(x.shape, channels), rate, x.dtype)
        self.calls += 1
        return x.mul_(mask) if inplace else x * mask


def dropout_of(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float, bool, bool]:
    """The arguments of a call of one of `DROPOUTS`."""
    return input, p, training, inplace


def written_out(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """A function made of those that a mode of torch has to see, in place of one that hides them; or None."""
    if function is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or (*args, 0, 0, 0, 0, 0)[4]):
        return _attention
    return _OPENED.get(function)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as its documentation writes it."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.mT * (1 / sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def _opened(function: Any) -> Callable[..., Any]:
    """A function of torch that is written in Python, without the line by which a mode sees it as one."""
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    seen = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    seen.__kwdefaults__ = function.__kwdefaults__
    return seen


def _iterated(x: Tensor) -> Iterator[Tensor]:
    return iter(x.unbind(0))


_OPENED: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _opened(F.multi_head_attention_forward),
    Tensor.__iter__: _iterated,
}


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
        return streams.on_host.keys("torch", step).tolist()

    @contextmanager
    def seeded(self, seed: int | None, device: torch.device) -> Iterator[None]:
        """Inside, torch draws from this seed; outside, as if nothing had been drawn."""
        if seed is None:
            yield
            return
        with _ONE_AT_A_TIME, torch.random.fork_rng(_cards(device)):
            torch.manual_seed(seed)
            before = generators(device)
            yield
            if self._drawn is None:
                self._drawn = not torch.equal(before, generators(device))


_ONE_AT_A_TIME = threading.Lock()


def generators(device: torch.device) -> Tensor:
    """The state of torch's generators for the host and for the device; it lies on the host."""
    return torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, _cards(device))])


def _cards(device: torch.device) -> list[torch.device]:
    """What has a generator beside the host's."""
    return [device] if device.type == "cuda" and torch.cuda.default_generators else []
