"""Sophia, which needs more than the gradient of a minibatch: curvature, which `needs.py` takes from the task.

Letters: k clients, P coordinates, m and h Sophia's running means of the gradient and of the curvature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Count, Decay, Named, Rule, Size, State
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class SophiaG(Rule):
    """Sophia-G: u = sign(m) * min(1, |m| / (rho * h + 1e-15)), h a running mean of batch size * (sampled gradient)^2.

    Liu, Li, Hall, Liang, Ma. Sophia: a scalable stochastic second-order optimizer for language model pre-training.
    arXiv:2305.14342 and the authors' sophia.py. The sampled gradient is that of the mean loss at labels drawn from the
    model's own predictions (Gauss-Newton-Bartlett); it is wanted at steps 1, 1 + every, ... and clipped like the
    gradient. Departure: the batch size enters h when that is refreshed, not the step, which is the same while batches
    keep their size. h has no bias correction: in a round of at most `every` steps nearly every entry is a sign step.

    Args:
        beta2: share of h that a refresh keeps.
        rho: factor on h; the smaller, the fewer entries make a full step.
    """

    beta1: Beta = 0.965
    beta2: Beta = 0.99
    rho: Size = 0.04
    every: Count = 10

    states: ClassVar[tuple[State, ...]] = (State("m"), State("h"))
    needs: ClassVar[frozenset[str]] = frozenset({"grad", "sampled_grad"})
    inputs: ClassVar[tuple[str, ...]] = ("sampled_grad", "batch_size")
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-4
    default_weight_decay: ClassVar[float] = 0.1

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        return self.inputs if bool(_due(t, self.every).any()) else ()

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"a1": 1 - self.beta1, "a2": (1 - self.beta2) * _due(t, self.every), "rho": self.rho}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        if getattr(s, "sampled_grad", None) is not None:
            if s.batch_size is None:
                raise ValueError("SophiaG: the sampled gradient comes with batch_size [k, 1] in aux")
            refresh_(s.h, s.sampled_grad.square() * s.batch_size, c.a2)
        return s.m.sign() * (s.m.abs() / (s.h * c.rho + 1e-15)).clamp_(max=1.0)


@dataclass(frozen=True, kw_only=True)
class SophiaH(Rule):
    """Sophia-H: u = clip(m / max(h, eps), -rho, rho), h a running mean of z * (H z) with random signs z (Hutchinson).

    Liu et al. arXiv:2305.14342. The Hessian-vector product is wanted at steps 1, 1 + every, ... Entries with negative
    curvature make a full step of rho.

    Args:
        beta2: share of h that a refresh keeps.
        rho: the largest step of an entry, before the learning rate.
        eps: least h to divide by.
    """

    beta1: Beta = 0.965
    beta2: Beta = 0.99
    rho: Size = 0.01
    eps: Size = 1e-12
    every: Count = 10

    states: ClassVar[tuple[State, ...]] = (State("m"), State("h"))
    needs: ClassVar[frozenset[str]] = frozenset({"grad", "hvp"})
    inputs: ClassVar[tuple[str, ...]] = ("hvp",)
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 0.06
    default_weight_decay: ClassVar[float] = 0.1

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        return self.inputs if bool(_due(t, self.every).any()) else ()

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"a1": 1 - self.beta1, "a2": (1 - self.beta2) * _due(t, self.every), "rho": self.rho, "eps": self.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        if getattr(s, "hvp", None) is not None:
            refresh_(s.h, s.hvp, c.a2)
        return (s.m / s.h.clamp(min=c.eps)).clamp_(-c.rho, c.rho)


def refresh_(h: Tensor, estimate: Tensor, rate: Tensor | float) -> None:
    """h = (1 - rate) * h + rate * estimate; a client's h stays as it is if its estimate is not finite."""
    usable = estimate.isfinite().all(1, keepdim=True)
    h.lerp_(torch.where(usable, estimate, h), rate)


def _due(t: Any, every: int) -> Any:
    return (t - 1) % every == 0
