"""Layers that torch.func.vmap cannot carry, or not exactly, and their twins of plain tensor operations.

A twin has everything that its original has: its parameters and buffers under the same names, so that the layout fits
both, and the attributes that the user's code may read.

Letters: B samples, T positions, Ch channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.engine.noise import keyed_copy

SHARES = "sample_shares"


def batchable_copy(module: nn.Module) -> nn.Module:
    """A keyed copy in which BatchNorm weighs its samples and nn.LSTM is written out.

    Raises:
        ValueError: as `keyed_copy`.
    """
    module = keyed_copy(module)
    if twin := _twin(module):
        return twin
    for layer in list(module.modules()):
        for name, child in list(layer.named_children()):
            if twin := _twin(child):
                setattr(layer, name, twin)
    return module


def share_names(module: nn.Module) -> list[str]:
    """The buffers of a batchable copy that take each sample's share [B] in its client's minibatch."""
    return [name for name, _ in module.named_buffers() if name.rsplit(".", 1)[-1] == SHARES]


class WeightedBatchNorm(_BatchNorm):
    """BatchNorm of an input [B, Ch, ...] whose samples count by `sample_shares` [B], summing to one (or all zero)."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    sample_shares: Tensor

    def __init__(self, source: _BatchNorm) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(source.__dict__)
        self.register_buffer(SHARES, torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        x = input
        shape = (1, -1, *(1 for _ in x.shape[2:]))
        if self.training or not self.track_running_stats:
            share = self.sample_shares
            if share.ndim == 0:
                share = x.new_ones(len(x)) / len(x)
            mean, var = self._statistics(x, share)
        else:
            mean, var = self.running_mean, self.running_var
        y = (x - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)

    def _statistics(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        positions = x[0, 0].numel()
        over = (0, *range(2, x.ndim))
        each = share.view(-1, *(1 for _ in x.shape[1:])) / positions
        mean = (x * each).sum(over)
        var = ((x - mean.view(1, -1, *(1 for _ in x.shape[2:]))).square() * each).sum(over)
        if self.track_running_stats and self.training:
            self._track(mean.detach(), var.detach(), (share > 0).to(x.dtype).sum() * positions)
        return mean, var

    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """New running statistics under the old names; the functional call hands them back."""
        active = (count > 0).to(mean.dtype)
        batches = self.num_batches_tracked + active
        rate = active * (1.0 / batches.clamp(min=1) if self.momentum is None else self.momentum)
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_mean = self.running_mean + rate * (mean - self.running_mean)
        self.running_var = self.running_var + rate * (unbiased - self.running_var)
        self.num_batches_tracked = batches


class PlainLSTM(nn.RNNBase):
    """nn.LSTM from zero states, batch first, as a loop over positions; gates in the order i, f, g, o."""

    def __init__(self, source: nn.LSTM) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(source.__dict__)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        last_h, last_c = [], []
        for i in range(self.num_layers):
            x, h, c = self._layer(x, i)
            last_h.append(h)
            last_c.append(c)
        return x, (torch.stack(last_h), torch.stack(last_c))

    def _layer(self, x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        w_hh = getattr(self, f"weight_hh_l{i}")
        pre = x @ getattr(self, f"weight_ih_l{i}").t()
        if self.bias:
            pre = pre + getattr(self, f"bias_ih_l{i}") + getattr(self, f"bias_hh_l{i}")
        h = c = torch.zeros_like(pre[:, 0, : w_hh.shape[1]])
        outputs = []
        for z in pre.unbind(1):
            gate_i, gate_f, gate_g, gate_o = (z + h @ w_hh.t()).chunk(4, -1)
            c = gate_f.sigmoid() * c + gate_i.sigmoid() * gate_g.tanh()
            h = gate_o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), h, c


def _twin(layer: nn.Module) -> nn.Module | None:
    twin: nn.Module | None = None
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        twin = WeightedBatchNorm(layer)
    elif type(layer) is nn.LSTM and not (layer.bidirectional or layer.proj_size or layer.dropout):
        twin = PlainLSTM(layer) if layer.batch_first else None
    return None if twin is None else twin.train(layer.training)
