"""Stacked layers with their backward passes written out; the factors of parameters' gradients go to a sink.

An op belongs to one session: it holds its views of the stack's parameters and what its forward pass leaves for its
backward pass. With one client there is no client axis, so products are plain `mm`s.

Letters: C clients, B samples, I inputs and O outputs of a layer, Ch channels. Values are [C, B, ...], or [B, ...]
when C = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedsim.engine.base import Batch
from fedsim.engine.calls import Place
from fedsim.engine.factors import Outer, Rows, Small, given
from fedsim.engine.noise import keep_mask, mask_shape, purpose
from fedsim.engine.sinks import Sink

aten = torch.ops.aten
NARROW = 16  # outputs of a layer; with fewer, W x^T is up to twice as fast as x W^T on a CPU


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One op of a tape, before it is bound to a stack.

    Args:
        make: the op's class.
        name: of the layer or function in the module.
        inputs: slots read.
        output: slot written.
        shape: of one sample's output.
        params: names of the tensors it owns, in the op's own order.
        needs: which inputs want a gradient.
        trains: some input or parameter wants one.
        in_place: nobody else reads the first input, and its maker keeps no copy: it may be overwritten.
        grad_in_place: the same of the output's gradient.
        channels_last: how a single client's images lie in memory for a convolution on a CPU.
        layer: the module that holds the settings of a layer recorded as a whole.
        settings: those of any other op, by the names of torch's function.
    """

    make: Callable[[Spec, Bound], Op]
    name: str
    inputs: tuple[int, ...]
    output: int
    shape: tuple[int, ...]
    params: tuple[str, ...] = ()
    needs: tuple[bool, ...] = ()
    trains: bool = True
    in_place: bool = False
    grad_in_place: bool = False
    channels_last: bool = True
    layer: nn.Module | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Bound:
    """What the ops of a session share: the stack's tensors by name, and what changes from step to step."""

    lead: int  # 1 with a client axis in front, 0 without
    views: dict[str, Tensor]
    low: bool  # products in bfloat16
    sink: Sink = field(init=False)
    batch: Batch = field(init=False)


class Op(Protocol):
    """A bound op: `forward(*inputs)`, and `backward(grad)` with one gradient per input, None where none is needed."""

    spec: Spec

    @property
    def forward(self) -> Callable[..., Tensor]: ...

    @property
    def backward(self) -> Callable[[Tensor], tuple[Tensor | None, ...]]: ...


class Linear:
    """z = x W^T + b over the last axis."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.bound, self.lead = spec, bound, bound.lead
        self.weight = bound.views[spec.params[0]]
        self.weight_t = self.weight.transpose(-1, -2)
        self.bias = bound.views[spec.params[1]] if len(spec.params) > 1 else None
        self.narrow = bool(bound.lead) and not bound.low and self.weight.shape[1] < NARROW and not self.weight.is_cuda
        if self.bias is not None and bound.lead:
            self.bias = self.bias.unsqueeze(2 if self.narrow else 1)

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        if x.ndim == 2 + self.lead:
            self.x = x
            return self._product(x)
        self.x = x.flatten(self.lead, -2)
        return self._product(self.x).view(*self.shape[:-1], -1)

    def backward(self, dz: Tensor) -> tuple[Tensor | None]:
        folded = len(self.shape) > 2 + self.lead
        if folded:
            dz = dz.flatten(self.lead, -2)
        deltas, inputs, dx = dz, self.x, None
        if self.bound.low:
            deltas, inputs = dz.bfloat16(), inputs.bfloat16()
        if self.spec.needs[0]:  # before a fused update changes the weights
            weight = self.weight.to(deltas.dtype)
            dx = (torch.bmm(deltas, weight) if self.lead else torch.mm(deltas, weight)).to(dz.dtype)
        samples, sink = self.shape[self.lead], self.bound.sink
        sink.take(self.spec.params[0], Outer(deltas, inputs, samples))
        if self.bias is not None:
            sink.take(
                self.spec.params[1],
                Small(lambda: dz.sum(-2), lambda: by_client(dz, self.lead).unflatten(1, (samples, -1)).sum(2)),
            )
        return (dx.view(self.shape) if folded and dx is not None else dx,)

    def _product(self, x: Tensor) -> Tensor:
        if self.bound.low:
            z = torch.matmul(x.bfloat16(), self.weight_t.bfloat16()).to(x.dtype)
            return z if self.bias is None else z.add_(self.bias)
        if self.narrow:
            x_t = x.transpose(1, 2)
            z_t = torch.bmm(self.weight, x_t) if self.bias is None else torch.baddbmm(self.bias, self.weight, x_t)
            return z_t.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, self.weight_t) if self.lead else torch.mm(x, self.weight_t)
        return torch.baddbmm(self.bias, x, self.weight_t) if self.lead else torch.addmm(self.bias, x, self.weight_t)


class ReLU:
    """max(x, 0); the output alone is kept."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        self.y = x.relu_() if self.spec.in_place else x.relu()
        return self.y

    def backward(self, dy: Tensor) -> tuple[Tensor]:
        # in place: memory that was just written is near; but of images the layout that the layer before wants is y's
        if self.spec.grad_in_place and dy.stride() == self.y.stride():
            return (aten.threshold_backward.grad_input(dy, self.y, 0, grad_input=dy),)
        return (aten.threshold_backward.default(dy, self.y, 0),)


class Reshape:
    """Any change of shape within a sample."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.lead = spec, bound.lead

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        return x.reshape(*x.shape[: self.lead + 1], *self.spec.shape)

    def backward(self, dy: Tensor) -> tuple[Tensor]:
        return (dy.reshape(self.shape),)


class Add:
    """x + y of one shape."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec = spec

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def backward(self, dz: Tensor) -> tuple[Tensor, Tensor]:
        return dz, dz


class Dropout:
    """Keyed dropout: the mask is a function of client, job, step, layer and position."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.bound = spec, bound

    def forward(self, x: Tensor) -> Tensor:
        batch, lead, settings = self.bound.batch, self.bound.lead, self.spec.settings
        if batch.streams is None:
            raise ValueError(f"dropout layer {settings['name']} needs keyed noise: give the batch its streams")
        keys = batch.streams.keys(purpose(settings["name"]), batch.step) + settings["call"]
        place: Place = settings["place"]
        shape = mask_shape(place.in_module(x.shape[lead:]), settings["channels"])
        mask = keep_mask(keys if lead else keys[0], shape, settings["p"], x.dtype)
        self.mask = place.samples_first(mask, lead)
        return x * self.mask

    def backward(self, dy: Tensor) -> tuple[Tensor]:
        return (dy * self.mask,)


class Local:
    """Any differentiable stacked function of (inputs, own parameters), by autograd on this one op."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.bound = spec, bound
        # .data: a view with a version counter of its own, or fused updates of other layers would look like a
        # change of what autograd saved here
        self.params = [bound.views[name].data for name in spec.params]

    def compute(self, *tensors: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        leaves = [t.detach().requires_grad_() if need else t for t, need in zip(inputs, self.spec.needs, strict=True)]
        params = [p.detach().requires_grad_() for p in self.params]
        with torch.set_grad_enabled(self.spec.trains):
            self.y = self.compute(*leaves, *params)
        self.leaves = [t for t, need in zip(leaves, self.spec.needs, strict=True) if need] + params
        return self.y.detach()

    def backward(self, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not self.y.requires_grad:  # the module took what it depends on out of the graph
            return tuple(None for _ in self.spec.needs)
        grads = iter(torch.autograd.grad(self.y, self.leaves, dy, allow_unused=True))
        del self.y
        inputs = tuple(next(grads) if need else None for need in self.spec.needs)
        for i, (name, grad) in enumerate(zip(self.spec.params, grads, strict=True)):
            if grad is not None:
                self.bound.sink.take(name, Small(given(grad), partial(self.each, i, dy)))
        return inputs

    def each(self, i: int, dy: Tensor) -> Tensor:
        """[C, B, *] gradients of samples by parameter i, for layers whose samples do not mix."""
        raise AssertionError("the session refuses tapes with such layers")


class Embedding:
    """Rows of a table."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.bound = spec, bound
        self.table = bound.views[spec.params[0]]

    def forward(self, index: Tensor) -> Tensor:
        self.index = index
        if not self.bound.lead:
            return self.table[index]
        client = torch.arange(len(index), device=index.device).view(-1, *(1 for _ in index.shape[1:]))
        return self.table[client, index]

    def backward(self, dy: Tensor) -> tuple[None]:
        padding = self.spec.settings["padding_idx"]
        if padding is not None:
            dy = dy.masked_fill((self.index == padding).unsqueeze(-1), 0.0)
        self.bound.sink.take(self.spec.params[0], Rows(dy, self.index, self.table.shape[-2], self.bound.lead))
        return (None,)


def by_client(value: Tensor, lead: int) -> Tensor:
    """[C, B, ...] also where C = 1."""
    return value if lead else value.unsqueeze(0)
