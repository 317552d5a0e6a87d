"""The end of a classifier in compiled C++, which `runtime.native` switches on in the stacked engine.

With torch the last layer and the loss are a dozen passes over small tensors, forward and backward; here they are one
call, which reads each client's samples once. The numbers are the same up to float rounding.

Letters: C clients, B samples, I inputs and K classes of the last layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsim.engine.factors import Small, given
from fedsim.engine.losses import Loss, cross_entropy, sample_shares
from fedsim.engine.ops import Bound, Linear, ReLU
from fedsim.engine.tape import Tape
from fedsim.native import TYPES, library
from fedsim.trees import Tree

FEWEST_INPUTS = 16  # the widest register's worth of numbers
MOST_CLASSES = 100  # beyond, torch's products are about as fast

_SEQUENCES = (nn.RNNBase, nn.Embedding)


def last_layer(tape: Tape, bound: Bound, loss: Loss) -> LastLayer | None:
    """The end of a tape in C++, or None where it ends otherwise."""
    last = tape.specs[-1] if tape.specs else None
    if loss is not cross_entropy or last is None or last.output != tape.result or last.make is not Linear:
        return None
    weight = bound.views[last.params[0]]
    plain = len(last.shape) == 1 and weight.is_cpu and not bound.low and weight.dtype in TYPES
    fits = plain and _fits(*weight.shape[-2:]) and compiled(weight.dtype) is not None
    return LastLayer(tape, bound) if fits else None


class LastLayer:
    """[ReLU,] a linear layer and mean cross-entropy, bound to the stack of a session. See `End`.

    It takes values [C, B, I] and targets [C, B] (without the first axis where C = 1), hands the gradients of weight
    [K, I] and bias [K] to the sink, and where ReLU is part of it, writes to the values.

    Raises:
        ValueError: when called, for values of another dtype than the layer's, and targets that are no class indices.
    """

    def __init__(self, tape: Tape, bound: Bound) -> None:
        layer, relu = tape.specs[-1], tape.specs[-2] if len(tape.specs) > 1 else None
        # ReLU works in place here, so only where it does so on the tape
        self.relu = relu is not None and relu.make is ReLU and relu.in_place and relu.output == layer.inputs[0]
        self.length = 1 + self.relu
        self.start = tape.specs[-self.length].inputs[0]
        self.wanted = layer.needs[0] and not self.relu
        self.bound, self.params = bound, layer.params
        weight, *bias = (bound.views[name] for name in layer.params)
        self.grads = [weight.new_empty(weight.shape), weight.new_empty(weight.shape[:-1])]
        self._sizes = weight.shape[-1], weight.shape[-2]
        self._layer = weight.data_ptr(), bias[0].data_ptr() if bias else None, weight.stride(0)
        self._grads = tuple(grad.data_ptr() for grad in self.grads)
        code = compiled(weight.dtype)
        assert code is not None
        self._code = code

    def __call__(self, value: Tensor, targets: Tree, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        h = value if value.stride(-1) == 1 else value.contiguous()
        assert isinstance(targets, Tensor)
        y = targets if targets.stride(-1) == 1 else targets.contiguous()
        if h.dtype != self.grads[0].dtype or y.dtype != torch.int64 or y.shape != h.shape[:-1]:
            raise ValueError(
                f"the last layer is of {self.grads[0].dtype} and takes a class index (int64) for each sample; "
                f"got values {tuple(h.shape)} of {h.dtype} and targets {tuple(y.shape)} of {y.dtype}"
            )
        share = None if weights is None else sample_shares(weights, h).contiguous()
        lead = self.bound.lead
        loss = h.new_empty(h.shape[:lead])
        dh = h.new_empty(h.shape) if self.wanted else None
        wrong = self._code(
            len(h) if lead else 1,
            h.shape[lead],
            *self._sizes,
            h.data_ptr(),
            h.stride(0),
            h.stride(-2),
            *self._layer,
            y.data_ptr(),
            y.stride(0),
            None if share is None else share.data_ptr(),
            loss.data_ptr(),
            *self._grads,
            None if dh is None else dh.data_ptr(),
            self.relu,
            torch.get_num_threads(),
        )
        if wrong >= 0:
            raise ValueError(f"target {int(y.reshape(-1)[wrong])} is no class of a model with {self._sizes[1]} outputs")
        for name, grad in zip(self.params, self.grads, strict=False):
            self.bound.sink.take(name, Small(given(grad)))
        return loss, h if self.relu else dh


def suits(module: nn.Module, loss: Loss, device: torch.device, precision: str) -> bool:
    """Whether a module ends so, as far as its layers tell, on a machine with a C++ compiler."""
    if device.type != "cpu" or precision != "fp32" or loss is not cross_entropy:
        return False
    if not all(p.requires_grad for p in module.parameters()):  # it has no tape
        return False
    layers = list(module.modules())
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linear or any(isinstance(layer, _SEQUENCES) for layer in layers):
        return False
    return _fits(linear[-1].out_features, linear[-1].in_features) and compiled(torch.float32) is not None


def _fits(num_classes: int, num_inputs: int) -> bool:
    return num_classes <= MOST_CLASSES and num_inputs >= FEWEST_INPUTS


@cache
def compiled(dtype: torch.dtype) -> Callable[..., int] | None:
    """`last_layer` of last_layer.cpp, or None on a machine without a compiler."""
    found = library((Path(__file__).parent / "last_layer.cpp").read_text(), dtype)
    if found is None:
        return None
    long, number, pointer = ctypes.c_long, ctypes.c_int, ctypes.c_void_p
    code = found.last_layer
    code.restype = long
    code.argtypes = [
        *(long, long, long, long, pointer, long, long, pointer, pointer, long, pointer, long, pointer),
        *(pointer, pointer, pointer, pointer, number, number),
    ]
    return code
