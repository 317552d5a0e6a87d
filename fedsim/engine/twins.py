"""Layers that torch.func.vmap cannot carry, or not exactly, and their twins of plain tensor operations.

A twin has everything that its original has: its parameters and buffers under the same names, so that the layout fits
both, and the attributes that the user's code may read.

Letters: B samples, T positions, Ch channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.engine.noise import keyed_copy

SHARES = "sample_shares"


def batchable_copy(module: nn.Module) -> nn.Module:
    """A keyed copy in which BatchNorm weighs its samples and nn.LSTM and nn.GRU are written out.

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


class PlainRecurrent(nn.RNNBase):
    """nn.LSTM or nn.GRU from zero states, as a loop over positions; gates in the order i, f, g, o or r, z, n."""

    def __init__(self, source: nn.LSTM | nn.GRU) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(source.__dict__)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        x = x if self.batch_first else x.transpose(0, 1)
        last_h, last_c = [], []
        for i in range(self.num_layers):
            x, h, c = self._layer(x, i)
            last_h.append(h)
            last_c.append(c)
        x, states = x if self.batch_first else x.transpose(0, 1), torch.stack(last_h)
        return x, (states, torch.stack(last_c)) if self.mode == "LSTM" else states

    def _layer(self, x: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor]:
        w_hh = getattr(self, f"weight_hh_l{i}")
        bias_ih, bias_hh = (getattr(self, f"bias_{of}_l{i}") if self.bias else None for of in ("ih", "hh"))
        pre = F.linear(x, getattr(self, f"weight_ih_l{i}"), bias_ih)
        h = c = torch.zeros_like(pre[:, 0, : w_hh.shape[1]])
        cell, outputs = _lstm_cell if self.mode == "LSTM" else _gru_cell, []
        for z in pre.unbind(1):
            h, c = cell(z, F.linear(h, w_hh, bias_hh), h, c)
            outputs.append(h)
        return torch.stack(outputs, 1), h, c


def _lstm_cell(of_inputs: Tensor, of_hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (of_inputs + of_hidden).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(of_inputs: Tensor, of_hidden: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (r, z, n), (hidden_r, hidden_z, hidden_n) = of_inputs.chunk(3, -1), of_hidden.chunk(3, -1)
    n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
    return n + (z + hidden_z).sigmoid() * (h - n), c


def _twin(layer: nn.Module) -> nn.Module | None:
    twin: nn.Module | None = None
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        twin = WeightedBatchNorm(layer)
    elif (type(layer) is nn.LSTM or type(layer) is nn.GRU) and not (
        layer.bidirectional or layer.proj_size or layer.dropout
    ):
        twin = PlainRecurrent(layer)
    return None if twin is None else twin.train(layer.training)
