"""Stacked convolution and max-pooling.

On a CPU a batched convolution is slower than one dense convolution per client, so clients take turns there; on a
GPU they become the groups of one convolution. On a CPU a single client's images lie channels last, which makes
max-pooling six times as fast; but not in a module with GroupNorm, which wants them the other way.

Letters: C clients, B samples, Ch and O channels in and out, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.engine.factors import CHUNK, Number, Small, add_, outer_square_norms
from fedsim.engine.ops import Bound, Spec, aten, by_client

Derivatives = tuple[Tensor, Tensor, Tensor]
"""Of one convolution: by images, weights and bias."""


class Conv2d:
    """x [C, B, Ch, H, W] with weights [C, O, Ch / groups, kh, kw].

    It is one convolution, or one for each client, and works on lists of as many images, weights and gradients.
    """

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.bound, self.lead = spec, bound, bound.lead
        self.weight = bound.views[spec.params[0]]
        self.bias = bound.views[spec.params[1]] if len(spec.params) > 1 else None
        self.as_groups = bool(bound.lead) and self.weight.is_cuda
        self.each = len(self.weight) if bound.lead and not self.as_groups else 1
        groups = spec.settings["groups"]
        self.groups = groups * (len(self.weight) if self.as_groups else 1)
        self.settings = spec.settings["stride"], spec.settings["padding"], spec.settings["dilation"]
        # torch 2.13 writes past the end of memory in the weights' gradient of a strided 1x1 convolution of fewer than
        # 8 channels whose images lie channels last
        inputs, *kernel = self.weight.shape[-3:]
        unsafe = kernel == [1, 1] and max(self.settings[0]) > 1 and inputs < 8
        self.lay_out = channels_last if spec.channels_last and not unsafe else torch.Tensor.contiguous

    def forward(self, x: Tensor) -> Tensor:
        self.x = self.split(x)
        biases = [None] * self.each if self.bias is None else self._of_each(self.bias)
        rows = zip(self.x, self._of_each(self.weight), biases, strict=True)
        return self.join([self._convolve(*row) for row in rows])

    def backward(self, dy: Tensor) -> tuple[Tensor | None]:
        sink = self.bound.sink
        total = not sink.by_sample  # in the same call as the gradient by the images, which costs a little less
        found = self.derivatives(self.split(dy), [self.spec.needs[0], total, total and self.bias is not None])
        sink.take(self.spec.params[0], Kernels(self, dy, found))
        if self.bias is not None:
            shape = self.bias.shape
            each = partial(torch.sum, by_client(dy, self.lead), (-2, -1))
            sink.take(self.spec.params[1], Small(lambda: stacked(found, 2).view(shape), each))
        return (self.join([part[0].to(dy.dtype) for part in found]) if self.spec.needs[0] else None,)

    def split(self, images: Tensor) -> list[Tensor]:
        """Images or gradients [C, B, Ch, H, W] for each convolution [B, Ch, H, W], as it wants them."""
        if self.as_groups:
            parts = [images.transpose(0, 1).flatten(1, 2)]
        else:
            parts = [self.lay_out(part) for part in (images if self.lead else (images,))]
        return [part.bfloat16() for part in parts] if self.bound.low else parts

    def join(self, parts: list[Tensor]) -> Tensor:
        """The way back from `split`."""
        if self.as_groups:
            return parts[0].unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        return torch.stack(parts) if self.lead else parts[0]

    def derivatives(self, dy: list[Tensor], wanted: list[bool]) -> list[Derivatives]:
        """For each convolution the gradients by images, weights and bias, those that are wanted."""
        size = None if self.bias is None else [dy[0].shape[1]]
        rest = (size, *self.settings, False, [0, 0], self.groups, wanted)
        rows = zip(dy, self.x, self._of_each(self.weight), strict=True)
        return [
            aten.convolution_backward.default(d, x, w.bfloat16() if self.bound.low else w, *rest) for d, x, w in rows
        ]

    def _of_each(self, tensor: Tensor) -> list[Tensor]:
        """Weights or biases of each convolution."""
        if self.as_groups:
            return [tensor.flatten(0, 1)]
        return list(tensor) if self.lead else [tensor]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.bound.low:
            return torch.conv2d(x, weight, bias, *self.settings, self.groups)
        y = torch.conv2d(x, weight.bfloat16(), None, *self.settings, self.groups).to(weight.dtype)
        return y if bias is None else y + bias.view(-1, 1, 1)


class Kernels:
    """A convolution's weights, from its images and the gradients [C, B, O, H, W] at its outputs. See `Factors`."""

    def __init__(self, op: Conv2d, deltas: Tensor, found: list[Derivatives]) -> None:
        self.op, self.deltas, self.found = op, deltas, found

    def write_(self, view: Tensor) -> None:
        view.copy_(stacked(self.found, 1).view(view.shape))

    def add_(self, view: Tensor, factor: Number) -> None:
        add_(view, stacked(self.found, 1).view(view.shape), factor)

    def square_norms(self) -> Tensor:
        found = [
            torch.stack([outer_square_norms(d, w) for d, w in zip(*piece, strict=True)]).sum(0)
            for piece in self._pieces()
        ]
        return torch.cat(found).view(by_client(self.deltas, self.op.lead).shape[:2])

    def formed(self) -> Tensor:
        found = [torch.cat([d.mT @ w for d, w in zip(*piece, strict=True)], 1) for piece in self._pieces()]
        return torch.cat(found).view(*by_client(self.deltas, self.op.lead).shape[:2], *self.op.weight.shape[-4:])

    def add_weighted_(self, view: Tensor, weights: Tensor) -> None:
        scaled = self.deltas * (weights if self.op.lead else weights[0])[..., None, None, None]
        found = self.op.derivatives(self.op.split(scaled), [False, True, False])
        view += stacked(found, 1).view(view.shape)

    def _pieces(self) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """(gradients [n, T, O], windows [n, T, I]) of some samples, each a tuple over the layer's groups."""
        op, deltas = self.op, by_client(self.deltas, self.op.lead)
        groups = op.spec.settings["groups"]
        stride, padding, dilation = (tuple(n) for n in op.settings)
        kernel = tuple(op.weight.shape[-2:])
        pixels, window = deltas.shape[-2:].numel(), op.weight.shape[-3:].numel() * groups
        some = max(1, CHUNK // (pixels * window))
        for images, of_client in zip(op.join(op.x) if op.as_groups else op.x, deltas, strict=True):
            for x, d in zip(images.split(some), of_client.split(some), strict=True):
                windows = F.unfold(x, kernel, dilation, padding, stride)
                yield d.flatten(2).mT.chunk(groups, -1), windows.mT.chunk(groups, -1)


class MaxPool2d:
    """The largest of each window, remembered by its index."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.lead = spec, bound.lead
        sizes = (pair(spec.settings[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
        self.settings = (*sizes, spec.settings["ceil_mode"])

    def forward(self, x: Tensor) -> Tensor:
        self.x = x.flatten(0, 1) if self.lead else x
        y, self.index = aten.max_pool2d_with_indices.default(self.x, *self.settings)
        return y.unflatten(0, x.shape[:2]) if self.lead else y

    def backward(self, dy: Tensor) -> tuple[Tensor]:
        rows = dy.shape[:2]
        if self.lead:
            dy = dy.flatten(0, 1)
        dx = aten.max_pool2d_with_indices_backward.default(dy, self.x, *self.settings, self.index)
        return (dx.unflatten(0, rows) if self.lead else dx,)


def padding_of(given: str | int | tuple[int, ...], kernel: Sequence[int], dilation: Sequence[int]) -> list[int] | None:
    """A convolution's padding in pixels, or None where it differs from side to side."""
    if not isinstance(given, str):
        return pair(given)
    if given == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return None if any(n % 2 for n in total) else [n // 2 for n in total]


def stacked(found: list[Derivatives], which: int) -> Tensor:
    """One of the derivatives of all convolutions."""
    return torch.stack([part[which] for part in found]) if len(found) > 1 else found[0][which]


def channels_last(x: Tensor) -> Tensor:
    """The same [B, Ch, H, W] with channels innermost in memory.

    One channel is laid out anew by hand: torch cannot tell it from the ordinary layout, and would choose that.
    """
    if x.is_cuda:
        return x
    if x.shape[1] == 1:
        return x.reshape(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def pair(n: int | Sequence[int]) -> list[int]:
    """A size along both axes of an image."""
    return [n, n] if isinstance(n, int) else [*n] * (2 // len(n))
