"""AdamP and SGDP: take out of the step what only makes scale-invariant weights grow.

Heo et al. AdamP. arXiv:2006.08217, as the authors' code. For tensors of two dimensions or more, with rows r of K
entries: cos_r = abs(<g_r, x_r>) / (norm(g_r) * norm(x_r)). If max_r cos_r < delta / sqrt(K), every row of u loses its
part along x_r; else the same test is made with the tensor as one row; else u stays. Where u was projected, decay is
multiplied by `wd_ratio`. The test is per tensor and client, so it is a mask and never a branch.

Letters: k clients, P coordinates, L tensors, R rows of all tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Decay, Fixed, Named, Reach, Rule, Size, State
from fedsim.optim.rules.arithmetic import adam_coefficients, denominator
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class AdamP(Rule):
    """AdamP: Adam's direction (Nesterov's with `nesterov`: beta1 * m + (1 - beta1) * g for m), projected.

    Args:
        delta: how large cos_r * sqrt(K) may be for u to be projected.
        wd_ratio: factor on the weight decay where u was projected.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-8
    delta: Fixed = 0.1
    wd_ratio: Fixed = 0.1
    nesterov: bool = False

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    reach: ClassVar[Reach] = "tensor"
    decay: ClassVar[Decay] = "in_update"  # decoupled in effect, scaled per tensor by the outcome of the test
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return adam_coefficients(self.beta1, self.beta2, self.eps, t)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        u = (s.m.lerp(g, c.a1) if self.nesterov else s.m) / denominator(s.v, c)
        u, ratio = project(x, g, u, seg, self.delta, self.wd_ratio, c.eps)
        return u + x * (c.decay * ratio)


@dataclass(frozen=True, kw_only=True)
class SgdP(Rule):
    """SGDP: momentum from zero, m = momentum * m + (1 - dampening) * g, projected; decay wd / (1 - momentum).

    Departure: without `nesterov` the authors' file projects m itself, since its step is an alias of the buffer; the
    paper's algorithm 1 and their AdamP project the step alone, and so does this.

    Args:
        eps: least norm that a row or tensor counts with in the test.
        delta: how large cos_r * sqrt(K) may be for u to be projected.
        wd_ratio: factor on the weight decay where u was projected.
    """

    momentum: Beta = 0.0
    dampening: Beta = 0.0
    nesterov: bool = False
    eps: Size = 1e-8
    delta: Fixed = 0.1
    wd_ratio: Fixed = 0.1

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    reach: ClassVar[Reach] = "tensor"
    decay: ClassVar[Decay] = "in_update"

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"keep": self.momentum, "take": 1 - self.dampening, "grown": 1 / (1 - self.momentum), "eps": self.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        m = s.m.mul_(c.keep).add_(g * c.take)
        u, ratio = project(x, g, g + m * c.keep if self.nesterov else m, seg, self.delta, self.wd_ratio, c.eps)
        return u + x * (c.decay * ratio * c.grown)


def project(
    x: Tensor, g: Tensor, u: Tensor, seg: Segments, delta: float, wd_ratio: float, eps: Tensor | float
) -> tuple[Tensor, Tensor]:
    """u [k, P] without its part along x where the test says so, and the factor on the decay [k, P]."""
    rows, tensor_of = seg.rows, seg.rows_of
    gg, xx, gx, xu = rows.sums(g * g), rows.sums(x * x), rows.sums(g * x), rows.sums(x * u)
    entries = rows.counts(g)
    row_limit = delta / tensor_of.maxima(entries).sqrt()
    by_row = seg.is_matrix(g) & (tensor_of.maxima(_cosines(gg, xx, gx, eps)) < row_limit)
    gg_all, xx_all, gx_all, xu_all = (tensor_of.sums(v) for v in (gg, xx, gx, xu))
    whole_limit = delta / seg.counts(g).sqrt()
    by_tensor = seg.is_matrix(g) & ~by_row & (_cosines(gg_all, xx_all, gx_all, eps) < whole_limit)
    along_row = xu / (xx.sqrt() + eps).square()
    along_tensor = torch.where(by_tensor, xu_all / (xx_all.sqrt() + eps).square(), 0.0)
    along = torch.where(tensor_of.expand(by_row), along_row, tensor_of.expand(along_tensor))
    ratio = torch.where(by_row | by_tensor, wd_ratio, torch.ones_like(gg_all))
    return u - x * rows.expand(along), seg.expand(ratio)


def _cosines(gg: Tensor, xx: Tensor, gx: Tensor, eps: Tensor | float) -> Tensor:
    floor = torch.as_tensor(eps, dtype=gg.dtype)  # one number may stay on the host
    return gx.abs() / (torch.maximum(gg.sqrt(), floor) * torch.maximum(xx.sqrt(), floor))
