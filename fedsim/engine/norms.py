"""Stacked normalisation layers, each by autograd on itself alone.

BatchNorm's statistics are weighted, so that padding counts for nothing, and its running statistics are written to
each client's own buffers as torch does: momentum, the unbiased variance, the number of batches.

Letters: C clients, B samples, Ch channels, S positions (pixels) of a sample.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.engine.ops import Bound, Local, Spec, by_client


class GroupNorm(Local):
    """Over groups of channels of one sample."""

    def compute(self, *tensors: Tensor) -> Tensor:
        x, *affine = tensors
        layer = self.spec.layer
        assert isinstance(layer, nn.GroupNorm)
        self.x = x.detach()
        if not self.bound.lead:
            # channels last, this layer would take several times as long on a CPU
            return F.group_norm(x.contiguous(), layer.num_groups, *_pair(affine), layer.eps)
        y = F.group_norm(x.flatten(0, 1), layer.num_groups, eps=layer.eps).unflatten(0, x.shape[:2])
        return _affine(y, affine, (1, -1, *(1 for _ in x.shape[3:])))

    def each(self, i: int, dy: Tensor) -> Tensor:
        layer, lead = self.spec.layer, self.bound.lead
        assert isinstance(layer, nn.GroupNorm)
        if i == 0:  # the scale
            y = F.group_norm(self.x.flatten(0, lead).contiguous(), layer.num_groups, eps=layer.eps)
            dy = dy * y.view(dy.shape)
        return by_client(dy, lead).flatten(3).sum(3)


class LayerNorm(Local):
    """Over the last axes of one sample."""

    def compute(self, *tensors: Tensor) -> Tensor:
        x, *affine = tensors
        layer = self.spec.layer
        assert isinstance(layer, nn.LayerNorm)
        self.x = x.detach()
        if not self.bound.lead:
            return F.layer_norm(x, layer.normalized_shape, *_pair(affine), layer.eps)
        y = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        between = x.ndim - 1 - len(layer.normalized_shape)
        return _affine(y, affine, (*(1 for _ in range(between)), *layer.normalized_shape))

    def each(self, i: int, dy: Tensor) -> Tensor:
        layer = self.spec.layer
        assert isinstance(layer, nn.LayerNorm)
        if i == 0:  # the scale
            dy = dy * F.layer_norm(self.x, layer.normalized_shape, eps=layer.eps)
        dy = by_client(dy, self.bound.lead)
        return dy.reshape(*dy.shape[:2], -1, *layer.normalized_shape).sum(2)


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
