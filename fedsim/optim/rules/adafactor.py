"""Adafactor: the second moment of a matrix as the product of its row and column means.

Shazeer, Stern. arXiv:1804.04235, as torch.optim.Adafactor (no first moment, no relative step). Kernels are viewed as
[out, in * kh * kw], where torch factors their last two dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Decay, Hyper, Named, Reach, Rule, Size, State, Within
from fedsim.optim.rules.arithmetic import nonzero, ratio
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """R, C <- lerp(R, C; row and column means of g^2; t^beta2_decay); V = R * C / mean(R); U = g / sqrt(V).

    u = max(eps2, rms(x)) * min(lr, 1 / sqrt(t)) / lr * U / max(1, rms(U) / d). A vector is one row, whose V is its
    column means: the full second moment. eps1 is the machine epsilon of the parameters' type.

    Args:
        beta2_decay: exponent of t in the share that new squares enter with; negative.
        eps2: least rms(x) that the step is relative to.
        d: rms(U) from which on the step is cut back.
    """

    beta2_decay: Annotated[Hyper, Within(float("-inf"), 0)] = -0.8
    eps2: Size = 1e-3
    d: Size = 1.0

    states: ClassVar[tuple[State, ...]] = (State("row", per="row"), State("column", per="column"))
    reach: ClassVar[Reach] = "tensor"
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 0.01

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        share = ratio(np.minimum(lr, 1 / np.sqrt(t)), lr)
        return {"a": 1.0 * t**self.beta2_decay, "share": share, "eps2": self.eps2, "d": self.d}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        rows, square = seg.rows, g * g
        s.row.lerp_(rows.sums(square) / rows.counts(g), c.a)
        s.column.lerp_(seg.column_sums(square) / seg.column_heights(g), c.a)
        mean = seg.rows_of.sums(s.row) / seg.rows_of.counts(g)
        share = s.row / seg.rows_of.expand(nonzero(mean))
        share = torch.where(seg.rows_of.expand(seg.is_matrix(g)), share, 1.0)
        v = rows.expand(share) * seg.expand_columns(s.column)
        eps1 = torch.finfo(g.dtype).eps
        u = g * v.clamp_(min=eps1 * eps1).rsqrt_()
        n = seg.counts(g).sqrt()
        rms_u, rms_x = seg.norms(u) / n, seg.norms(x) / n
        floor = torch.as_tensor(c.eps2, dtype=g.dtype)  # one number may stay on the host
        return u * seg.expand(torch.maximum(rms_x, floor) * c.share / (rms_u / c.d).clamp_(min=1.0))
