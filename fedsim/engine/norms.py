"""Stacked normalisation layers, LayerNorm by hand and the others by autograd on themselves alone.

BatchNorm's statistics are weighted, so that padding counts for nothing, and its running statistics are written to
each client's own buffers as torch does: momentum, the unbiased variance, the number of batches.

Letters: C clients, B samples, Ch channels, S positions (pixels) of a sample.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.engine.factors import Small, given
from fedsim.engine.ops import Bound, Local, Spec, aten, by_client


class GroupNorm(Local):
    """Over groups of channels of one sample."""

    def compute(self, *tensors: Tensor) -> Tensor:
        x, *affine = tensors
        groups, eps = self.spec.settings["num_groups"], self.spec.settings["eps"]
        self.x = x.detach()
        if not self.bound.lead:
            # channels last, this layer would take several times as long on a CPU
            return F.group_norm(x.contiguous(), groups, *_pair(affine), eps)
        y = F.group_norm(x.flatten(0, 1), groups, eps=eps).unflatten(0, x.shape[:2])
        return _affine(y, affine, (1, -1, *(1 for _ in x.shape[3:])))

    def each(self, i: int, dy: Tensor) -> Tensor:
        settings, lead = self.spec.settings, self.bound.lead
        if i == 0:  # the scale
            y = F.group_norm(self.x.flatten(0, lead).contiguous(), settings["num_groups"], eps=settings["eps"])
            dy = dy * y.view(dy.shape)
        return by_client(dy, lead).flatten(3).sum(3)


class LayerNorm:
    """Over the last axes of one sample, by torch's kernel; on a stack that gets no scales, as it has one for all."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        self.spec, self.bound, self.lead = spec, bound, bound.lead
        self.shape, self.eps = list(spec.settings["normalized_shape"]), spec.settings["eps"]
        self.affine = [bound.views[name] for name in spec.params]
        self.within = (None, None) if self.lead else _pair(self.affine)
        between = (1,) * (len(spec.shape) + 1 - len(self.shape))  # axes of samples and positions
        self.behind = _pair([p.unflatten(0, (-1, *between)) for p in self.affine]) if self.lead else (None, None)
        self.over = tuple(range(self.lead, self.lead + len(between)))

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        self.y, *self.moments = aten.native_layer_norm.default(x, self.shape, *self.within, self.eps)
        scale, shift = self.behind
        if scale is None:
            return self.y
        return self.y * scale if shift is None else torch.addcmul(shift, self.y, scale)

    def backward(self, dy: Tensor) -> tuple[Tensor | None]:
        rest, wanted = (self.x, self.shape, *self.moments, *self.within), [self.spec.needs[0], not self.lead]
        scale, y = self.behind[0], self.y
        dn = dy if scale is None else dy * scale
        dx, *found = aten.native_layer_norm_backward.default(dn, *rest, [*wanted, wanted[1] and len(self.affine) > 1])
        totals = [lambda: (dy * y).sum(self.over), lambda: dy.sum(self.over)] if self.lead else map(given, found)
        for i, (name, total) in enumerate(zip(self.spec.params, totals, strict=False)):
            self.bound.sink.take(name, Small(total, partial(self._each, i, dy, self.x)))
        return (dx,)

    def _each(self, i: int, dy: Tensor, x: Tensor) -> Tensor:
        """[C, B, *] gradients of samples by the scale or the shift."""
        if i == 0:
            dy = dy * F.layer_norm(x, self.shape, eps=self.eps)
        dy = by_client(dy, self.lead)
        return dy.reshape(*dy.shape[:2], -1, *self.shape).sum(2)


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
        shape = (1, -1, *(1 for _ in x.shape[lead + 2 :]))
        return _affine(y, affine, shape) if lead else _affine(y.unsqueeze(0), affine, shape).squeeze(0)

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


def _affine(y: Tensor, affine: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """y [C, B, ...] * scale + bias, each [C, ...] and laid out as [C, *shape]."""
    if not affine:
        return y
    clients = y.shape[0]
    scale, *bias = (p.reshape(clients, *(n if n != -1 else p.numel() // clients for n in shape)) for p in affine)
    return y * scale + bias[0] if bias else y * scale
