"""Stacked convolution and max-pooling.

On a CPU a batched convolution is slower than one dense convolution per client, so clients take turns there; on a
GPU they become the groups of one convolution. A single client's images lie channels last, which makes max-pooling
six times as fast on a CPU.

Letters: C clients, B samples, Ch and O channels in and out, H and W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsim.engine.ops import Bound, Spec, aten


class Conv2d:
    """x [C, B, Ch, H, W] with weights [C, O, Ch / groups, kh, kw]."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        layer = spec.layer
        assert isinstance(layer, nn.Conv2d)
        self.spec, self.bound = spec, bound
        self.weight = bound.views[spec.params[0]]
        self.bias = bound.views[spec.params[1]] if len(spec.params) > 1 else None
        self.groups = layer.groups
        self.settings = (list(layer.stride), padding(layer) or [0, 0], list(layer.dilation))

    def forward(self, x: Tensor) -> Tensor:
        if not self.bound.lead:
            self.x = [channels_last(x)]
            return self._convolve(self.x[0], self.weight, self.bias, self.groups)
        if x.is_cuda:
            return self._forward_grouped(x)
        self.x = [channels_last(row) for row in x]
        biases = [None] * len(x) if self.bias is None else list(self.bias)
        rows = zip(self.x, self.weight, biases, strict=True)
        return torch.stack([self._convolve(*row, self.groups) for row in rows])

    def backward(self, dy: Tensor) -> tuple[Tensor | None]:
        lead, sink = self.bound.lead, self.bound.sink
        dx: Tensor | None
        dw: Tensor | None
        db: Tensor | None
        if lead and dy.is_cuda:
            dx, dw, db = self._backward_grouped(dy)
        elif lead:
            rows = [
                self._gradients(channels_last(d), x, w, self.groups)
                for d, x, w in zip(dy, self.x, self.weight, strict=True)
            ]
            dx, dw, db = (_stack(part) for part in zip(*rows, strict=True))
        else:
            dx, dw, db = self._gradients(channels_last(dy), self.x[0], self.weight, self.groups)
        assert dw is not None
        sink.tensor(self.spec.params[0], dw)
        if db is not None:
            sink.tensor(self.spec.params[1], db)
        return (dx,)

    def _forward_grouped(self, x: Tensor) -> Tensor:
        """Clients as groups: [B, C Ch, H, W] with weights [C O, Ch, kh, kw]."""
        clients = x.shape[0]
        self.x = [x.transpose(0, 1).flatten(1, 2)]
        bias = None if self.bias is None else self.bias.reshape(-1)
        y = self._convolve(self.x[0], self.weight.flatten(0, 1), bias, clients * self.groups)
        return y.unflatten(1, (clients, -1)).transpose(0, 1)

    def _backward_grouped(self, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        clients = dy.shape[0]
        flat = dy.transpose(0, 1).flatten(1, 2)
        dx, dw, db = self._gradients(flat, self.x[0], self.weight.flatten(0, 1), clients * self.groups)
        if dx is not None:
            dx = dx.unflatten(1, (clients, -1)).transpose(0, 1)
        return dx, dw.view(self.weight.shape), None if db is None else db.view(clients, -1)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        if not self.bound.low:
            return torch.conv2d(x, weight, bias, *self.settings, groups)
        y = torch.conv2d(x.bfloat16(), weight.bfloat16(), None, *self.settings, groups).to(x.dtype)
        return y if bias is None else y + bias.view(-1, 1, 1)

    def _gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, groups: int
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        sizes = None if self.bias is None else [dy.shape[1]]
        wanted = [self.spec.needs[0], True, self.bias is not None]
        dtype = dy.dtype
        if self.bound.low:
            dy, x, weight = dy.bfloat16(), x.bfloat16(), weight.bfloat16()
        dx, dw, db = aten.convolution_backward.default(
            dy, x, weight, sizes, *self.settings, False, [0, 0], groups, wanted
        )
        return None if dx is None else dx.to(dtype), dw, db


class MaxPool2d:
    """The largest of each window, remembered by its index."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        layer = spec.layer
        assert isinstance(layer, nn.MaxPool2d)
        self.spec, self.lead = spec, bound.lead
        stride = layer.kernel_size if layer.stride is None else layer.stride
        sizes = (layer.kernel_size, stride, layer.padding, layer.dilation)
        self.settings = (*(_pair(n) for n in sizes), layer.ceil_mode)

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


def padding(layer: nn.Conv2d) -> list[int] | None:
    """A convolution's padding in pixels, or None where it differs from side to side."""
    if isinstance(layer.padding, tuple):
        return list(layer.padding)
    if layer.padding == "valid":
        return [0, 0]
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(n % 2 for n in total) else [n // 2 for n in total]


def channels_last(x: Tensor) -> Tensor:
    """The same [B, Ch, H, W] with channels innermost in memory.

    One channel is laid out anew by hand: torch cannot tell it from the ordinary layout, and would choose that.
    """
    if x.is_cuda:
        return x
    if x.shape[1] == 1:
        return x.reshape(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def _stack(rows: tuple[Tensor | None, ...]) -> Tensor | None:
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None


def _pair(n: int | tuple[int, ...]) -> list[int]:
    return [n, n] if isinstance(n, int) else list(n)
