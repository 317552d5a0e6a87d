"""Stacked normalisation layers: those of single samples by torch's kernels, BatchNorm by autograd on itself alone.

BatchNorm's statistics are weighted, so that padding counts for nothing, and its running statistics are written to
each client's own buffers as torch does: momentum, the unbiased variance, the number of batches.

Letters: C clients, B samples, Ch channels, S positions (pixels) of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.engine.factors import Small, given
from fedsim.engine.ops import Bound, Local, Spec, aten, by_client


class SampleNorm:
    """A norm of single samples, by torch's kernel; on a stack that gets no scales, as it has one for all clients.

    Args:
        scaled: the axes of a sample along which its scale and its shift have entries.
    """

    def __init__(self, spec: Spec, bound: Bound, scaled: Sequence[int]) -> None:
        self.spec, self.bound, self.lead = spec, bound, bound.lead
        self.affine = [bound.views[name] for name in spec.params]
        self.within = (None, None) if self.lead else _pair(self.affine)
        shape = [n if axis in scaled else 1 for axis, n in enumerate(spec.shape)]
        self.behind = _pair([p.view(-1, 1, *shape) for p in self.affine]) if self.lead else (None, None)
        self.over = [axis + self.lead + 1 for axis in range(len(shape)) if axis not in scaled]

    def normal(self, x: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(y, mean, 1 / deviation) of x [.., B, *]."""
        raise NotImplementedError

    def normal_back(self, dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by x and, where asked for, by scale and shift."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        self.y, *self.moments = self.normal(x, *self.within)
        scale, shift = self.behind
        if scale is None:
            return self.y
        return self.y * scale if shift is None else torch.addcmul(shift, self.y, scale)

    def backward(self, dy: Tensor) -> tuple[Tensor | None]:
        scale, y, over = self.behind[0], self.y, [self.lead, *self.over]
        wanted = [self.spec.needs[0], not self.lead, not self.lead and len(self.affine) > 1]
        dn = dy if scale is None else dy * scale
        dx, *found = self.normal_back(dn, self.x, *self.moments, *self.within, wanted)
        totals = [lambda: (dy * y).sum(over), lambda: dy.sum(over)] if self.lead else map(given, found)
        for i, (name, total) in enumerate(zip(self.spec.params, totals, strict=False)):
            self.bound.sink.take(name, Small(total, partial(self._each, i, dy, self.x)))
        return (dx,)

    def _each(self, i: int, dy: Tensor, x: Tensor) -> Tensor:
        """[C, B, *] gradients of samples by the scale or the shift."""
        dy = by_client(dy * self.normal(x, None, None)[0] if i == 0 else dy, self.lead)
        return dy.sum([axis + 1 - self.lead for axis in self.over]) if self.over else dy


class GroupNorm(SampleNorm):
    """Over groups of channels."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        super().__init__(spec, bound, [0])
        self.sizes = spec.shape[0], prod(spec.shape[1:])
        self.groups, self.eps = spec.settings["num_groups"], spec.settings["eps"]

    def normal(self, x: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        samples = x.shape[: self.lead + 1].numel()
        # channels last, this kernel would take several times as long on a CPU
        return aten.native_group_norm.default(x.contiguous(), *affine, samples, *self.sizes, self.groups, self.eps)

    def normal_back(self, dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd, scale, _, wanted = rest
        samples, back = x.shape[: self.lead + 1].numel(), aten.native_group_norm_backward.default
        x, dy = x.contiguous(), dy.contiguous()
        return back(dy, x, mean, rstd, scale, samples, *self.sizes, self.groups, wanted)


class LayerNorm(SampleNorm):
    """Over the last axes."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.shape, self.eps = spec.settings["normalized_shape"], spec.settings["eps"]
        super().__init__(spec, bound, range(len(spec.shape) - len(self.shape), len(spec.shape)))

    def normal(self, x: Tensor, *affine: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return aten.native_layer_norm.default(x, self.shape, *affine, self.eps)

    def normal_back(self, dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd, scale, shift, wanted = rest
        return aten.native_layer_norm_backward.default(dy, x, self.shape, mean, rstd, scale, shift, wanted)


class BatchNorm(Local):
    """Over the samples (and positions) of one client, per channel."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        super().__init__(spec, bound)
        layer = spec.layer
        assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        self.layer = layer
        prefix = f"{spec.name}." if spec.name else ""
        names = ("running_mean", "running_var", "num_batches_tracked")
        self.running = [bound.views[prefix + name].data for name in names] if layer.track_running_stats else []

    def compute(self, *tensors: Tensor) -> Tensor:
        x, *affine = tensors
        lead, weights = self.bound.lead, self.bound.batch.weights
        if not lead and weights is None and self.running and self.layer.momentum is not None:
            mean, var, batches = self.running
            batches += 1
            return F.batch_norm(x, mean, var, *_pair(affine), True, self.layer.momentum, self.layer.eps)
        over = (lead, *range(lead + 2, x.ndim))  # samples and positions
        share, count = self._shares(x, weights if weights is None or lead else weights[0])
        mean = (x * share).sum(over, keepdim=True)
        centred = x - mean
        var = (centred.square() * share).sum(over, keepdim=True)
        if self.running:
            with torch.no_grad():
                self._track_(mean.reshape(*x.shape[:lead], -1), var.reshape(*x.shape[:lead], -1), count)
        y = centred * torch.rsqrt(var + self.layer.eps)
        shape = (*x.shape[:lead], 1, -1, *(1 for _ in x.shape[lead + 2 :]))
        scale, shift = _pair([p.reshape(shape) for p in affine])
        y = y if scale is None else y * scale
        return y if shift is None else y + shift

    def _shares(self, x: Tensor, weights: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Each element's share of its channel's mean, as a factor of x, and the number of elements [C, 1] behind it."""
        lead = self.bound.lead
        positions = prod(x.shape[lead + 2 :])
        if weights is None:
            count = x.shape[lead] * positions
            return 1.0 / count, float(count)
        samples = (weights > 0).to(x.dtype)
        total = samples.sum(-1, keepdim=True) * positions
        share = samples / total.clamp(min=1)
        return share.view(*share.shape, *(1 for _ in x.shape[lead + 1 :])), total

    def _track_(self, mean: Tensor, var: Tensor, count: Tensor | float) -> None:
        """One step of the running statistics; a client without samples keeps its own."""
        running_mean, running_var, batches = self.running
        if isinstance(count, Tensor):
            active = count > 0
            batches += active.to(batches.dtype).view(batches.shape)
            unbiased = var * (count / (count - 1).clamp(min=1))
        else:
            active = None
            batches += 1
            unbiased = var * (count / max(count - 1, 1))
        rate: Tensor | float
        if self.layer.momentum is None:
            rate = (1.0 / batches.clamp(min=1)).view(*batches.shape, 1)
        else:
            rate = self.layer.momentum
        if active is not None:
            rate = rate * active.to(mean.dtype)
        running_mean += rate * (mean - running_mean)
        running_var += rate * (unbiased - running_var)


def _pair(affine: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """(scale, bias), None where a layer has none."""
    scale, bias, *_ = (*affine, None, None)
    return scale, bias
