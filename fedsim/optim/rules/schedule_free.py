"""Schedule-free rules: gradients are taken at y, and an average x of the base iterates z is what gets evaluated.

Defazio et al. The road less scheduled. arXiv:2405.15682, as the schedulefree package. The stack holds y; x is what
`Optimizer.final` returns, and what a client must send. Weights W live per client and begin anew with a fresh state.

y parameter, z base iterate, t the client's step, eta = lr * min(1, t / warmup), w = t^r * max(eta)^power, c = w / W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Decay, Fixed, Named, Rule, Share, Size, State, Whole
from fedsim.optim.rules.arithmetic import maximum, minimum, ratio, start_, where
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSgd(Rule):
    """y = (1 - c) * y + c * z + eta * (beta * (1 - c) - 1) * g; z -= eta * g; x = y + (1 - 1 / beta) * (z - y).

    Args:
        beta: how far from z towards the average x the gradients are taken.
        r: exponent of t in the weights of the average.
        power: exponent of the largest learning rate so far in these weights.
    """

    beta: Share = 0.9
    warmup: Whole = 0
    r: Fixed = 0.0
    power: Fixed = 2.0

    states: ClassVar[tuple[State, ...]] = (State("z"),)
    host: ClassVar[tuple[str, ...]] = ("weight", "lr_max")
    owns_lr: ClassVar[bool] = True
    default_lr: ClassVar[float | None] = 1.0

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        rise = minimum(1.0, t / self.warmup) if self.warmup else 1.0
        host.lr_max = maximum(host.lr_max, lr * rise)
        w = t**self.r * host.lr_max**self.power
        host.weight = host.weight + w
        share = ratio(w, host.weight)
        return {"rise": rise, "share": share, "pull": 1 - self.beta * (1 - share), "first": where(t > 1, 0.0, 1.0)}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return _move(x, g, s.z, c)

    def final(self, x: Tensor, s: Named) -> Tensor:
        """x from y and z; with beta = 0 the gradients are taken at z, and x cannot be told from them."""
        b = torch.as_tensor(self.beta, dtype=x.dtype, device=x.device).reshape(-1, 1)
        return torch.where(b > 0, x + (1 - 1 / b) * (s.z - x), x)


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(ScheduleFreeSgd):
    """Schedule-free SGD on g / (sqrt(v / bc2) + eps) + wd * y."""

    beta2: Beta = 0.999
    eps: Size = 1e-8

    states: ClassVar[tuple[State, ...]] = (State("z"), State("v"))
    decay: ClassVar[Decay] = "in_update"
    default_lr: ClassVar[float | None] = 2.5e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        root = 1 / np.sqrt(1 - self.beta2**t)
        return {**super().coefficients(t, lr, host), "a2": 1 - self.beta2, "root": root, "eps": self.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.v.lerp_(g * g, c.a2)
        return _move(x, g / (s.v.sqrt() * c.root + c.eps) + x * c.decay, s.z, c)


def _move(y: Tensor, g: Tensor, z: Tensor, c: Named) -> Tensor:
    start_(z, y, c.first)
    step = g * (c.lr * c.rise)
    u = (y - z) * c.share + step * c.pull
    z.sub_(step)
    return u
