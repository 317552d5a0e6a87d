"""Elementwise rules that change what Adam's moments are made of: Yogi, AdaBelief, diffGrad, Adan, SPAM.

x parameter, g gradient, m and v moments, t the client's step (1 first), bc_i = 1 - beta_i^t. Each rule returns u for
x -= lr * u.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Decay, Fixed, Named, Rule, Size, State
from fedsim.optim.rules.arithmetic import adam_coefficients, denominator, rectification, where
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Yogi(Rule):
    """Yogi: v -= (1 - beta2) * sign(v - g^2) * g^2; u = (m / bc1) / (sqrt(abs(v / bc2)) + eps); m, v start at `init`.

    Zaheer et al. Adaptive methods for nonconvex optimization. NeurIPS 2018. Without `bias_correction` it is the
    server's step of FedYogi (Reddi et al. arXiv:2003.00295).

    Args:
        init: m and v at the start.
        bias_correction: divide by bc1 and bc2; otherwise both are 1.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-3
    init: Fixed = 1e-6
    bias_correction: bool = True

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    default_lr: ClassVar[float | None] = 0.01

    def active_states(self) -> tuple[State, ...]:
        return (State("m", init=self.init), State("v", init=self.init))

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return adam_coefficients(self.beta1, self.beta2, self.eps, t, corrected=self.bias_correction)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        square = g * g
        s.v.sub_((s.v - square).sign_().mul_(square).mul_(c.a2))
        return s.m / denominator(s.v.abs(), c)


@dataclass(frozen=True, kw_only=True)
class AdaBelief(Rule):
    """AdaBelief: Adam with s = beta2 * s + (1 - beta2) * (g - m)^2 + eps in place of v; eps stays in s every step.

    Zhuang et al. arXiv:2010.07468, as the authors' adabelief_pytorch 0.2.0.

    Args:
        beta2: share of s that a step keeps.
        eps: added to s in every step, and to its root.
        rectify: take RAdam's factor from length 5 on, the authors' default; it is off here because it hides the method
            in the first steps of every round.
        amsgrad: divide by the largest s so far.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-16
    rectify: bool = False
    amsgrad: bool = False

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"), State("v_max"))
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-3

    def active_states(self) -> tuple[State, ...]:
        return self.states if self.amsgrad else self.states[:2]

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return adam_coefficients(self.beta1, self.beta2, self.eps, t) | (
            rectification(self.beta1, self.beta2, self.eps, t, lambda length: length >= 5) if self.rectify else {}
        )

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_((g - s.m).square_(), c.a2).add_(c.eps)
        v = torch.maximum(s.v_max, s.v, out=s.v_max) if self.amsgrad else s.v
        if self.rectify:
            return (s.m * c.scale).div_(v.sqrt().mul_(c.on).add_(c.off))
        return s.m / denominator(v, c)


@dataclass(frozen=True, kw_only=True)
class DiffGrad(Rule):
    """diffGrad: Adam (raw eps) damped by sigmoid(abs(g_prev - g)), between 1/2 for a steady gradient and 1.

    Dubey et al. arXiv:1909.11015, as the authors' second file; their first stores an alias of g, so the factor is 1/2
    always. It is not free of scale: tiny gradients are damped by 1/2 whatever they do.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-8

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"), State("g_prev"))
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return adam_coefficients(self.beta1, self.beta2, self.eps, t, raw=True)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        damping = (s.g_prev - g).abs_().neg_().exp_().add_(1)  # one over the sigmoid, which saves a division
        s.g_prev.copy_(g)
        return s.m / denominator(s.v, c).mul_(damping)


@dataclass(frozen=True, kw_only=True)
class Adan(Rule):
    """Adan: moments of g, of its change D = g - g_prev (0 at first) and of (g + beta2 * D)^2.

    u = (m / bc1 + beta2 * d / bc2) / (sqrt(n / bc3) + eps), then x = (x - lr * u) / (1 + lr * wd).
    Xie et al. arXiv:2208.06677, as the authors' code: the betas are rates of keeping (the paper's are one minus these).
    Their `no_prox` is `decay: decoupled` here, their max_grad_norm is `clip: {global: ...}`.

    Args:
        beta1: share of m, the running mean of gradients, that a step keeps.
        beta2: share of d, the running mean of changes, that a step keeps.
        beta3: share of n, the running mean of squares, that a step keeps.
    """

    beta1: Beta = 0.98
    beta2: Beta = 0.92
    beta3: Beta = 0.99
    eps: Size = 1e-8

    states: ClassVar[tuple[State, ...]] = (State("m"), State("d"), State("n"), State("g_prev"))
    decay: ClassVar[Decay] = "prox"
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        bc1, bc2, bc3 = 1 - self.beta1**t, 1 - self.beta2**t, 1 - self.beta3**t
        own = {
            "a1": 1 - self.beta1,
            "a2": 1 - self.beta2,
            "a3": 1 - self.beta3,
            "beta2": self.beta2,
            "later": where(t > 1, 1.0, 0.0),
        }
        return own | {"of_d": self.beta2 * bc1 / bc2, "root": bc1 / np.sqrt(bc3), "shift": bc1 * self.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        change = (g - s.g_prev).mul_(c.later)
        s.g_prev.copy_(g)
        s.m.lerp_(g, c.a1)
        s.d.lerp_(change, c.a2)
        s.n.lerp_(change.mul_(c.beta2).add_(g).square_(), c.a3)
        return (s.d * c.of_d).add_(s.m).div_(denominator(s.n, c))
