"""Rules that need a number per tensor or per client: LARS, LAMB, SGD-SaI, Stable-SPAM, AuON, AdaGrad-Norm.

x parameter, g gradient, m and v moments; norms are of one tensor of one client unless said otherwise. Each rule returns
u for x -= lr * u. Weight decay that sits in the update arrives as `c.decay` (lambda per coordinate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Count, Decay, Named, Reach, Rule, Share, Size, State, Whole, Within
from fedsim.optim.rules.arithmetic import adam_coefficients, denominator, nonzero, where
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Lars(Rule):
    """LARS: on matrices g = (g + wd * x) * trust * norm(x) / (norm(g) + wd * norm(x)), then momentum; vectors take g.

    You, Gitman, Ginsburg. Large batch training of convolutional networks. arXiv:1708.03888.

    Args:
        trust: the trust coefficient (eta).
    """

    momentum: Share = 0.9
    dampening: Share = 0.0
    nesterov: bool = False
    trust: Size = 1e-3

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    reach: ClassVar[Reach] = "tensor"
    decay: ClassVar[Decay] = "in_update"

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"keep": self.momentum, "take": 1 - self.dampening, "trust": self.trust}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        decay = x * c.decay
        size, total = seg.norms(x), seg.norms(g) + seg.norms(decay)
        ratio = torch.where((size > 0) & (total > 0), size * c.trust / nonzero(total), 1.0)
        ratio = torch.where(seg.is_matrix(g), ratio, 1.0)
        g = (g + decay) * seg.expand(ratio)
        m = s.m.mul_(c.keep).add_(g * c.take)
        return g + m * c.keep if self.nesterov else m


@dataclass(frozen=True, kw_only=True)
class Lamb(Rule):
    """LAMB: u = Adam's direction + wd * x, times norm(x) / norm(u) (1 where either is zero).

    You et al. arXiv:1904.00962, as optax.lamb: bias-corrected, norms unclamped.

    Args:
        adapt_vectors: scale tensors of one dimension too, as optax does, and not matrices alone.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-6
    adapt_vectors: bool = False

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    reach: ClassVar[Reach] = "tensor"
    decay: ClassVar[Decay] = "in_update"
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return adam_coefficients(self.beta1, self.beta2, self.eps, t)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        u = s.m / denominator(s.v, c) + x * c.decay
        size, length = seg.norms(x), seg.norms(u)
        ratio = torch.where((size > 0) & (length > 0), size / nonzero(length), 1.0)
        if not self.adapt_vectors:
            ratio = torch.where(seg.is_matrix(g), ratio, 1.0)
        return u * seg.expand(ratio)


@dataclass(frozen=True, kw_only=True)
class SgdSai(Rule):
    """SGD-SaI: u = gain * m, the gain per tensor fixed at the first gradient: norm(g) / (std(g) + eps).

    Xu et al. No more Adam. arXiv:2412.11768, as the authors' code: m = g first, then (1 - momentum) * g enters. The
    gain is sqrt(n - 1) / sqrt(1 - n * mean^2 / norm^2), so mostly a rate that grows with the tensor. Tensors of one
    entry take gain 1 (their code divides by eps there) and momentum 0 is allowed (theirs fails). Clients with
    different data get different gains and so different rates; with `state_scope: server` all go on with the mean of
    the first round's.

    Args:
        eps: added to the deviation std(g).
    """

    momentum: Beta = 0.9
    eps: Size = 1e-8

    states: ClassVar[tuple[State, ...]] = (State("m"), State("gain", per="tensor"))
    reach: ClassVar[Reach] = "tensor"
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-2

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"take": where(t > 1, 1 - self.momentum, 1.0), "first": where(t > 1, 0.0, 1.0), "eps": self.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        if not isinstance(c.first, float) or c.first != 0:
            s.gain.lerp_(sai_gain(g, seg, c.eps), c.first)
        s.m.lerp_(g, c.take)
        return s.m * seg.expand(s.gain)


def sai_gain(g: Tensor, seg: Segments, eps: Tensor | float = 1e-8) -> Tensor:
    """SGD-SaI's gain of each tensor, [k, L], from gradients [k, P]; 1 for tensors of one entry."""
    n = seg.counts(g)
    mean = seg.sums(g) / n
    variance = seg.sums((g - seg.expand(mean)).square_()) / (n - 1).clamp(min=1)
    return torch.where(n < 2, 1.0, seg.norms(g) / (variance.sqrt() + eps))


@dataclass(frozen=True, kw_only=True)
class StableSpam(Rule):
    """Stable-SPAM: clip spikes by a running maximum, rescale by a running norm, then Adam with resets.

    Huang et al. arXiv:2502.17055. Per tensor, with bias-corrected averages: T of max(abs(g)) (gamma3); where abs(g) >
    T, g = g / max(abs(g)) * T; then g = g / norm(g) * mean(norm, gamma1) / (sqrt(mean(norm^2, gamma2)) + eps). At
    every `interval` the moments are reset. `total` > 0 anneals gamma1 and beta1 by a cosine from 1 to `floor`, which is
    reached after total + 1 steps, as in their file (where it would rise again after that). Their file updates the old
    buffers at a reset, goes on at counter 2, and uses that counter for the gammas from the next step on, which turns
    spike clipping off for hundreds of steps; `official_reset` does the same, the clean reset is the default.

    Args:
        eps: added to the root in both denominators.
        gamma1: share of the mean of norms that a step keeps.
        gamma2: share of the mean of squared norms that a step keeps.
        gamma3: share of the mean of largest entries, T, that a step keeps.
        total: steps over which beta1 and gamma1 are annealed; 0 for none.
        floor: the factor that the annealing ends at (eta_min).
        official_reset: reset as the authors' file does.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-8
    gamma1: Beta = 0.7
    gamma2: Beta = 0.9
    gamma3: Beta = 0.999
    interval: Count = 1000
    total: Whole = 0
    floor: float = 0.5
    official_reset: bool = False

    states: ClassVar[tuple[State, ...]] = (
        State("m"),
        State("v"),
        State("top", per="tensor"),
        State("norm", per="tensor"),
        State("square", per="tensor"),
    )
    reach: ClassVar[Reach] = "tensor"
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        since = t % self.interval
        k = where(t < self.interval, t, since + 1)
        scale, end = 1.0, self.total + 1
        if self.total:
            scale = self.floor + (1 - self.floor) * (1 + np.cos(np.pi * np.minimum(t, end) / end)) / 2
        gamma1 = self.gamma1 * scale
        # at a reset their counter still stands where the last one left it: they set it back after the gammas
        theirs = where(since == 0, np.minimum(t, self.interval + 1), k)
        corrected = theirs if self.official_reset else t
        reset = where(since == 0, 0.0, 1.0)
        return adam_coefficients(self.beta1 * scale, self.beta2, self.eps, k) | {
            "before": 1.0 if self.official_reset else reset,
            "after": reset if self.official_reset else 1.0,
            "g1": 1 - gamma1,
            "g2": 1 - self.gamma2,
            "g3": 1 - self.gamma3,
            "bc_norm": 1 - gamma1**corrected,
            "bc_square": 1 - self.gamma2**corrected,
            "bc_top": 1 - self.gamma3**corrected,
        }

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.mul_(c.before)
        s.v.mul_(c.before)
        largest = seg.maxima(g.abs())
        top = s.top.lerp_(largest, c.g3) / c.bc_top
        g = torch.where(g.abs() > seg.expand(top), g * seg.expand(top / nonzero(largest)), g)
        norm = seg.norms(g)
        s.norm.lerp_(norm, c.g1)
        s.square.lerp_(norm * norm, c.g2)
        wanted = (s.norm / c.bc_norm) / ((s.square / c.bc_square).sqrt() + c.eps)
        g = g * seg.expand(torch.where(norm > 0, wanted / nonzero(norm), 1.0))
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        u = s.m / denominator(s.v, c)
        s.m.mul_(c.after)
        s.v.mul_(c.after)
        return u


@dataclass(frozen=True, kw_only=True)
class AuOn(Rule):
    """AuON: Nesterov momentum G, q = G / norm(G), u = sqrt(max(1, rows / columns)) * q / rms(cosh(q)).

    AuON (2025), the paper's rule; the rms of cosh is 1 up to 1 / 2d, so this is normalised SGD. `raw` is the current
    package's rule: G, not q, divided by the rms of cosh(1.5 q), without the shape factor, which is plain Nesterov SGD
    up to 1.1 / d.
    """

    momentum: Beta = 0.95
    raw: bool = False

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    reach: ClassVar[Reach] = "tensor"
    roles: ClassVar[tuple[str, ...]] = ("matrix",)
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 0.05

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"a": 1 - self.momentum}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        nesterov = s.m.lerp_(g, c.a).lerp(g, c.a)
        q = nesterov / seg.expand(seg.norms(nesterov) + 1e-7)
        spread = (q * 1.5 if self.raw else q).cosh()
        scale = 1 / ((seg.sums(spread.square_()) / seg.counts(g)).sqrt() + 1e-8)
        if self.raw:
            return nesterov * seg.expand(scale)
        return q * seg.expand(scale * seg.shape_factors(g))


@dataclass(frozen=True, kw_only=True)
class AdaGradNorm(Rule):
    """AdaGrad-Norm: s += norm(g)^2 over all tensors of a client, s_0 = b0^2; u = g / sqrt(s).

    Ward, Wu, Bottou. AdaGrad stepsizes. arXiv:1806.01811.

    Args:
        b0: root of s at the start.
    """

    b0: Annotated[float, Within(1e-30, float("inf"))] = 0.1

    states: ClassVar[tuple[State, ...]] = (State("total", per="client"),)
    reach: ClassVar[Reach] = "tensor"
    default_lr: ClassVar[float | None] = 0.1

    def active_states(self) -> tuple[State, ...]:
        return (State("total", per="client", init=self.b0**2),)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.total.add_(torch.linalg.vector_norm(g, dim=1, keepdim=True).square_())
        return g / s.total.sqrt()
