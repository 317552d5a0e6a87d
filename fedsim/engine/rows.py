"""Which functions of torch, and which layers, have an op of their own: one row each.

A row takes a recorded call's arguments under the names that torch gives them, and says which of them are inputs,
parameters and settings of the op; or nothing, where the op does not fit. What has no op is part of a `Segment`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import nn
from torch.nn import functional as F

from fedsim.engine.calls import Call, Place, Ref
from fedsim.engine.images import Conv2d, MaxPool2d, padding_of, pair
from fedsim.engine.noise import DROPOUTS, FUNCTIONAL, KeyedDropout, dropout_of
from fedsim.engine.norms import BatchNorm, GroupNorm, LayerNorm
from fedsim.engine.ops import Add, Dropout, Embedding, Linear, Op, ReLU, Reshape
from fedsim.engine.recurrent import GRU, LSTM

IN_FRONT = Place()


@dataclass(frozen=True)
class Row:
    """The op for one call.

    Args:
        make: the op's class.
        inputs: what depends on the samples.
        params: parameters of the module, None for one that is not there; of a layer, their names.
        settings: see `Spec`.
    """

    make: Callable[..., Op]
    inputs: tuple[Any, ...]
    params: tuple[Any, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """The call for which an op is sought, and all calls."""

    call: Call
    calls: list[Call]

    def of(self, ref: Any) -> Call:
        """The call that gives an argument.

        Raises:
            TypeError: for a constant.
        """
        if not isinstance(ref, Ref):
            raise TypeError("not a value")
        return self.calls[ref.index]

    def before(self) -> Iterator[Call]:
        """The calls before this one."""
        return takewhile(lambda other: other is not self.call, self.calls)

    def in_front(self, *refs: Any) -> bool:
        """Whether the samples are the first axis of these values and of the call's."""
        return all(c.place == IN_FRONT for c in (self.call, *map(self.of, refs)))


def row_of(call: Call, calls: list[Call]) -> Row | None:
    """The op for a call, with names in place of its parameters; None if there is none."""
    asked = Asked(call, calls)
    find = FUNCTIONS.get(call.name) if call.layer is None else LAYERS.get(type(call.layer))
    if find is None or not call.live:
        return None
    try:
        row = find(asked, *call.args, **call.kwargs)
        if row is None or not all(asked.of(x).live for x in row.inputs):
            return None
        params = [p if isinstance(p, str) else asked.of(p) for p in row.params if p is not None]
    except TypeError:  # arguments in another form than the row knows
        return None
    if not all(isinstance(p, str) or p.parameter for p in params):
        return None
    return Row(row.make, row.inputs, tuple(p if isinstance(p, str) else p.name for p in params), row.settings)


def _linear(asked: Asked, input: Ref, weight: Ref, bias: Ref | None = None) -> Row | None:
    return Row(Linear, (input,), (weight, bias)) if _behind(asked.of(input), 1) else None


def _relu(asked: Asked, input: Ref, inplace: bool = False) -> Row:
    return Row(ReLU, (input,))


def _add(asked: Asked, input: Ref, other: Ref) -> Row | None:
    x, y = asked.of(input), asked.of(other)
    return Row(Add, (input, other)) if x.shape == y.shape and x.place == y.place else None


def _reshape(asked: Asked, input: Ref, *shape: Any, **named: Any) -> Row | None:
    x = asked.of(input)
    return Row(Reshape, (input,)) if asked.call.dtype == x.dtype and asked.in_front(input) else None


def _conv2d(
    asked: Asked,
    input: Ref,
    weight: Ref,
    bias: Ref | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Row | None:
    stride, dilation = pair(stride), pair(dilation)
    pixels = padding_of(padding, asked.of(weight).shape[-2:], dilation)
    if pixels is None or not asked.in_front(input) or len(asked.of(input).shape) != 4:
        return None
    settings = {"stride": stride, "padding": pixels, "dilation": dilation, "groups": groups}
    return Row(Conv2d, (input,), (weight, bias), settings)


def _max_pool2d(
    asked: Asked,
    input: Ref,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Row | None:
    if return_indices or not asked.in_front(input) or len(asked.of(input).shape) != 4:
        return None
    sizes = {"kernel_size": kernel_size, "stride": stride or kernel_size, "padding": padding, "dilation": dilation}
    return Row(MaxPool2d, (input,), (), {**{k: pair(n) for k, n in sizes.items()}, "ceil_mode": ceil_mode})


def _group_norm(
    asked: Asked, input: Ref, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Row | None:
    if weight is None or not asked.in_front(input):
        return None
    return Row(GroupNorm, (input,), (weight, bias), {"num_groups": num_groups, "eps": eps})


def _layer_norm(
    asked: Asked, input: Ref, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Row | None:
    if weight is None or not _behind(asked.of(input), len(normalized_shape)):
        return None
    return Row(LayerNorm, (input,), (weight, bias), {"normalized_shape": tuple(normalized_shape), "eps": eps})


def _embedding(
    asked: Asked,
    input: Ref,
    weight: Ref,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Row | None:
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    padding = None if padding_idx is None else padding_idx % asked.of(weight).shape[0]
    return Row(Embedding, (input,), (weight,), {"padding_idx": padding})


def _dropout(asked: Asked, *args: Any, **kwargs: Any) -> Row:
    input, rate, *_ = dropout_of(*args, **kwargs)
    before = sum(c.function in DROPOUTS for c in asked.before())
    return _dropped(asked, input, FUNCTIONAL, rate, DROPOUTS[getattr(F, asked.call.name)], before)


def _dropout_layer(asked: Asked, input: Ref) -> Row:
    layer = asked.call.layer
    assert isinstance(layer, KeyedDropout)
    before = sum(c.layer is layer for c in asked.before())
    return _dropped(asked, input, asked.call.name, layer.p, layer.channels, before)


def _dropped(asked: Asked, input: Any, name: str, rate: float, channels: bool, before: int) -> Row:
    """Dropout after so many calls that drew from its stream, also such as the outputs do not depend on."""
    settings = {"name": name, "p": rate, "channels": channels, "call": before, "place": asked.call.place}
    return Row(Dropout, (input,), (), settings)


def _batch_norm(asked: Asked, input: Ref) -> Row | None:
    return Row(BatchNorm, (input,), _names(asked)) if asked.in_front(input) else None


def _recurrent(asked: Asked, input: Ref) -> Row | None:
    layer = asked.call.layer
    assert isinstance(layer, nn.LSTM | nn.GRU)
    if layer.bidirectional or layer.proj_size or (layer.dropout and layer.num_layers > 1):
        return None
    # a slot has the samples in front in any case, and then the positions
    if asked.of(input).place != Place(0 if layer.batch_first else 1) or len(asked.of(input).shape) != 3:
        return None
    return Row(LSTM if isinstance(layer, nn.LSTM) else GRU, (input,), _names(asked))


def _names(asked: Asked) -> tuple[str, ...]:
    """Of a layer's parameters."""
    assert asked.call.layer is not None
    before = f"{asked.call.name}." if asked.call.name else ""
    return tuple(before + name for name, _ in asked.call.layer.named_parameters(recurse=False))


def _behind(call: Call, axes: int) -> bool:
    """Whether the samples are before a value's last axes."""
    return call.place is not None and call.place.axis < len(call.shape) - axes


FUNCTIONS: dict[str, Callable[..., Row | None]] = {
    "linear": _linear,
    "relu": _relu,
    "relu_": _relu,
    "add": _add,
    "add_": _add,
    **dict.fromkeys(("flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "contiguous"), _reshape),
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "embedding": _embedding,
    **{function.__name__: _dropout for function in DROPOUTS},
}

LAYERS: dict[type[nn.Module], Callable[..., Row | None]] = {
    KeyedDropout: _dropout_layer,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
}
