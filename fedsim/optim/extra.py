"""Rules that need more than the gradient of a minibatch: Sophia; and gradients that come from somewhere else.

`zeroth_order` and `dp` say where the gradient of a step comes from; any rule then steps along it. `needs.py` computes
them from what a task supplies.

Letters: k clients, P coordinates, m and h Sophia's running means of the gradient and of the curvature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.decode import suggest
from fedsim.optim.rule import Hyper, Named, Rule, State, check_range
from fedsim.optim.segments import Segments
from fedsim.params import ROLES, Layout


@dataclass(frozen=True, kw_only=True)
class SophiaG(Rule):
    """Sophia-G: u = sign(m) * min(1, |m| / (rho * h + 1e-15)), h a running mean of batch size * (sampled gradient)^2.

    Liu, Li, Hall, Liang, Ma. Sophia: a scalable stochastic second-order optimizer for language model pre-training.
    arXiv:2305.14342 and the authors' sophia.py. The sampled gradient is that of the mean loss at labels drawn from the
    model's own predictions (Gauss-Newton-Bartlett); it is wanted at steps 1, 1 + every, ... and clipped like the
    gradient. Departure: the batch size enters h when that is refreshed, not the step, which is the same while batches
    keep their size. h has no bias correction: in a round of at most `every` steps nearly every entry is a sign step.
    """

    beta1: Hyper = 0.965
    beta2: Hyper = 0.99
    rho: Hyper = 0.04
    every: int = 10

    states: ClassVar[tuple[State, ...]] = (State("m"), State("h"))
    needs: ClassVar[frozenset[str]] = frozenset({"grad", "sampled_grad"})
    inputs: ClassVar[tuple[str, ...]] = ("sampled_grad", "batch_size")
    decay: ClassVar[str] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-4
    default_weight_decay: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta1", "beta2")
        check_range(self, 0, float("inf"), "rho")
        check_range(self, 1, float("inf"), "every")

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        return self.inputs if bool(_due(t, self.every).any()) else ()

    def wanted(self, t: np.ndarray) -> frozenset[str]:
        return self.needs if bool(_due(t, self.every).any()) else frozenset({"grad"})

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        return {"a1": 1 - h.beta1, "a2": (1 - h.beta2) * _due(t, self.every), "rho": h.rho}

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
    """

    beta1: Hyper = 0.965
    beta2: Hyper = 0.99
    rho: Hyper = 0.01
    eps: Hyper = 1e-12
    every: int = 10

    states: ClassVar[tuple[State, ...]] = (State("m"), State("h"))
    needs: ClassVar[frozenset[str]] = frozenset({"grad", "hvp"})
    inputs: ClassVar[tuple[str, ...]] = ("hvp",)
    decay: ClassVar[str] = "decoupled"
    default_lr: ClassVar[float | None] = 0.06
    default_weight_decay: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta1", "beta2")
        check_range(self, 0, float("inf"), "rho", "eps")
        check_range(self, 1, float("inf"), "every")

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        return self.inputs if bool(_due(t, self.every).any()) else ()

    def wanted(self, t: np.ndarray) -> frozenset[str]:
        return self.needs if bool(_due(t, self.every).any()) else frozenset({"grad"})

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        return {"a1": 1 - h.beta1, "a2": (1 - h.beta2) * _due(t, self.every), "rho": h.rho, "eps": h.eps}

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


@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """The gradient from losses alone: g = mean over z of (loss(x + eps z) - loss(x - eps z)) / (2 eps) * z.

    Malladi et al. Fine-tuning language models with just forward passes (MeZO). arXiv:2305.17333. Both losses are taken
    on one batch, without dropout; z is standard normal, keyed by client, step and coordinate, so a step is known from
    its number and one scalar per direction. Departure: x is not perturbed in place, which would drift by rounding.

    Args:
        eps: how far the losses are apart.
        directions: how many z a step averages over, two losses each.
    """

    eps: float = 1e-3
    directions: int = 1

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"optimizer.zeroth_order.eps must be positive, got {self.eps}")
        if self.directions < 1:
            raise ValueError(f"optimizer.zeroth_order.directions must be at least 1, got {self.directions}")


@dataclass(frozen=True, kw_only=True)
class Private:
    """The private gradient: g = (sum_i g_i * min(1, clip / (norm(g_i) + 1e-6)) + noise * clip * z) / expected batch.

    Abadi et al. Deep learning with differential privacy (DP-SGD). arXiv:1607.00133. The norm is over all of a client's
    tensors. The noise is keyed by client and step. Sampling and the privacy account are not the optimizer's.

    Args:
        clip: bound on the norm of a sample's gradient; or {role or tensor name: bound}, each for the norms of its own
            tensors one by one, every tensor having one. The noise then goes with the root of the sum of their squares.
        noise: the noise multiplier sigma; 0 for none.
        batch_size: what to divide by (the expected size under Poisson sampling); without it, the batch's own size.
    """

    clip: float | Mapping[str, float]
    noise: float = 0.0
    batch_size: float | None = None

    def __post_init__(self) -> None:
        bounds = tuple(self.clip.values()) if isinstance(self.clip, Mapping) else (self.clip,)
        for bound in bounds:
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
                raise ValueError(f"optimizer.dp.clip must be positive, got {bound!r}; take .inf to not clip")
        if not self.noise >= 0:
            raise ValueError(f"optimizer.dp.noise must be >= 0, got {self.noise!r}")
        if self.batch_size is not None and not self.batch_size > 0:
            raise ValueError(f"optimizer.dp.batch_size must be positive, got {self.batch_size!r}")
        if self.noise > 0 and any(bound == float("inf") for bound in bounds):
            raise ValueError("optimizer.dp.noise is relative to clip, which is infinite; give a bound or no noise")

    def bounds(self, layout: Layout) -> tuple[float, ...]:
        """One number for all tensors together, or one per tensor; a tensor's name counts more than its role.

        Raises:
            ValueError: a tensor without a bound, or a name that no tensor has.
        """
        if not isinstance(self.clip, Mapping):
            return (self.clip,)
        for key in self.clip:
            suggest(key, (*ROLES, *layout.names), "optimizer.dp.clip", what="role or tensor")
        found = [
            self.clip.get(name, self.clip.get(role)) for name, role in zip(layout.names, layout.roles, strict=True)
        ]
        lacking = [name for name, bound in zip(layout.names, found, strict=True) if bound is None]
        if lacking:
            raise ValueError(f"optimizer.dp.clip has no bound for {', '.join(lacking)}; name them or their roles")
        return tuple(bound for bound in found if bound is not None)
