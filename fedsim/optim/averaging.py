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

from fedsim.optim.arithmetic import maximum, minimum, ratio, start_, where
from fedsim.optim.rule import Hyper, Named, Rule, State, check_range
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSgd(Rule):
    """y = (1 - c) * y + c * z + eta * (beta * (1 - c) - 1) * g; z -= eta * g; x = y + (1 - 1 / beta) * (z - y)."""

    beta: Hyper = 0.9
    warmup: int = 0
    r: float = 0.0
    power: float = 2.0

    states: ClassVar[tuple[State, ...]] = (State("z"),)
    host: ClassVar[tuple[str, ...]] = ("weight", "lr_max")
    owns_lr: ClassVar[bool] = True
    default_lr: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta", open_high=False)
        check_range(self, 0, float("inf"), "warmup", "r", "power")

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        return _weights(h, t, q)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return _move(x, g, s.z, c)

    def final(self, x: Tensor, s: Named, h: Named) -> Tensor:
        return _average(x, s.z, h.beta)


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(Rule):
    """Schedule-free SGD on g / (sqrt(v / bc2) + eps) + wd * y."""

    beta: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8
    warmup: int = 0
    r: float = 0.0
    power: float = 2.0

    states: ClassVar[tuple[State, ...]] = (State("z"), State("v"))
    host: ClassVar[tuple[str, ...]] = ("weight", "lr_max")
    decay: ClassVar[str] = "in_update"
    owns_lr: ClassVar[bool] = True
    default_lr: ClassVar[float | None] = 2.5e-3

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta", open_high=False)
        check_range(self, 0, 1, "beta2")
        check_range(self, 0, float("inf"), "eps", "warmup", "r", "power")

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        root = 1 / np.sqrt(1 - h.beta2**t)
        return dict(_weights(h, t, q)) | {"a2": 1 - h.beta2, "root": root, "eps": h.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.v.lerp_(g * g, c.a2)
        return _move(x, g / (s.v.sqrt() * c.root + c.eps) + x * c.decay, s.z, c)

    def final(self, x: Tensor, s: Named, h: Named) -> Tensor:
        return _average(x, s.z, h.beta)


def _weights(h: Named, t: Any, q: Named) -> Mapping[str, Any]:
    rise = minimum(1.0, t / h.warmup) if h.warmup else 1.0
    q.lr_max = maximum(q.lr_max, h.lr * rise)
    w = t**h.r * q.lr_max**h.power
    q.weight = q.weight + w
    share = ratio(w, q.weight)
    return {"rise": rise, "share": share, "pull": 1 - h.beta * (1 - share), "first": where(t > 1, 0.0, 1.0)}


def _move(y: Tensor, g: Tensor, z: Tensor, c: Named) -> Tensor:
    start_(z, y, c.first)
    step = g * (c.lr * c.rise)
    u = (y - z) * c.share + step * c.pull
    z.sub_(step)
    return u


def _average(y: Tensor, z: Tensor, beta: float | np.ndarray) -> Tensor:
    """x from y and z; with beta = 0 the gradients are taken at z, and x cannot be told from them."""
    b = torch.as_tensor(beta, dtype=y.dtype, device=y.device).reshape(-1, 1)
    return torch.where(b > 0, y + (1 - 1 / b) * (z - y), y)
