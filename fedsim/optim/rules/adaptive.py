"""Elementwise rules with a running second moment: Adam, NAdam, RAdam, Adagrad, RMSprop.

x parameter, g gradient, m and v its first and second moments, t the client's step (1 first), bc1 = 1 - beta1^t and
bc2 = 1 - beta2^t. Each rule returns u for x -= lr * u. With the few steps of one round bc2 makes all of these close to
sign descent when their state is fresh each round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Fixed, Named, Rule, Size, State
from fedsim.optim.rules.arithmetic import adam_coefficients, denominator, rectification, where
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam: u = (m / bc1) / (sqrt(v / bc2) + eps), with m, v the running means of g and g^2.

    Kingma, Ba. Adam. arXiv:1412.6980. With `decay: decoupled` it is AdamW (Loshchilov, Hutter. Decoupled weight decay
    regularization. arXiv:1711.05101). Without `bias_correction` it is the server's step of FedAdam (Reddi et al.
    arXiv:2003.00295, algorithm 2), whose v begins at `init` = tau^2 = eps^2.

    Args:
        amsgrad: divide by the running maximum of the uncorrected v (Reddi et al. arXiv:1904.09237), as torch does.
        eps_mode: `corrected`, or `raw`: (sqrt(bc2) / bc1) * m / (sqrt(v) + eps), whose effective eps is
            eps / sqrt(bc2); GaLore and SPAM are built on that form.
        bias_correction: divide by bc1 and bc2; otherwise both are 1.
        init: v at the start.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-8
    amsgrad: bool = False
    eps_mode: Literal["corrected", "raw"] = "corrected"
    bias_correction: bool = True
    init: Fixed = 0.0

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"), State("v_max"))
    default_lr: ClassVar[float | None] = 1e-3

    def active_states(self) -> tuple[State, ...]:
        states = (State("m"), State("v", init=self.init), State("v_max", init=self.init))
        return states if self.amsgrad else states[:2]

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return adam_coefficients(
            self.beta1, self.beta2, self.eps, t, raw=self.eps_mode == "raw", corrected=self.bias_correction
        )

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        v = torch.maximum(s.v_max, s.v, out=s.v_max) if self.amsgrad else s.v
        return s.m / denominator(v, c)


@dataclass(frozen=True, kw_only=True)
class Adagrad(Rule):
    """Adagrad: a += g^2; u = g / (sqrt(a) + eps), with lr / (1 + (t - 1) * lr_decay).

    Duchi, Hazan, Singer. Adaptive subgradient methods. JMLR 12 (2011).

    Args:
        lr_decay: how fast the learning rate falls.
        init: a at the start.
    """

    eps: Size = 1e-10
    lr_decay: Size = 0.0
    init: Fixed = 0.0

    default_lr: ClassVar[float | None] = 0.01
    states: ClassVar[tuple[State, ...]] = (State("a"),)

    def active_states(self) -> tuple[State, ...]:
        return (State("a", init=self.init),)

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        slow = 1 + (t - 1) * self.lr_decay
        return {"slow": slow, "eps": self.eps * slow}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.a.add_(g * g)
        return g / s.a.sqrt().mul_(c.slow).add_(c.eps)


@dataclass(frozen=True, kw_only=True)
class RmsProp(Rule):
    """RMSprop: v = alpha * v + (1 - alpha) * g^2; u = g / (sqrt(v) + eps), or its momentum m = momentum * m + u.

    Tieleman, Hinton. Lecture 6.5 (2012), as torch.optim.RMSprop.

    Args:
        alpha: share of v that a step keeps.
        momentum: share of m that a step keeps; 0 takes u itself.
        centered: subtract the squared running mean of g inside the root.
    """

    alpha: Beta = 0.99
    eps: Size = 1e-8
    momentum: Beta = 0.0
    centered: bool = False

    states: ClassVar[tuple[State, ...]] = (State("v"), State("mean"), State("m"))
    default_lr: ClassVar[float | None] = 0.01

    def active_states(self) -> tuple[State, ...]:
        kept = {"v": True, "mean": self.centered, "m": self.momentum != 0}
        return tuple(state for state in self.states if kept[state.name])

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"a": 1 - self.alpha, "eps": self.eps, "keep": self.momentum}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.v.lerp_(g * g, c.a)
        v = s.v
        if self.centered:
            s.mean.lerp_(g, c.a)
            v = v - s.mean * s.mean
        u = g / (v.sqrt() + c.eps)
        return s.m.mul_(c.keep).add_(u) if self.momentum != 0 else u


@dataclass(frozen=True, kw_only=True)
class NAdam(Rule):
    """NAdam: Adam with Nesterov momentum, mu_t = beta1 * (1 - 0.5 * 0.96^(t * momentum_decay)).

    Dozat. Incorporating Nesterov momentum into Adam. ICLR workshop 2016, as torch.optim.NAdam:
    u = ((1 - mu_t) / (1 - prod_t) * g + mu_{t+1} / (1 - prod_t * mu_{t+1}) * m) / (sqrt(v / bc2) + eps).

    Args:
        beta1: share of m that a step keeps, and the limit of mu_t.
        momentum_decay: how fast mu_t rises to beta1.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-8
    momentum_decay: Size = 4e-3

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    host: ClassVar[tuple[str, ...]] = ("product",)
    default_lr: ClassVar[float | None] = 2e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        mu = self.beta1 * (1 - 0.5 * 0.96 ** (t * self.momentum_decay))
        mu_next = self.beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * self.momentum_decay))
        host.product = where(t > 1, host.product, 1.0) * mu
        of_g, of_m = (1 - mu) / (1 - host.product), mu_next / (1 - host.product * mu_next)
        root = 1 / np.sqrt(1 - self.beta2**t)
        return {"a1": 1 - self.beta1, "a2": 1 - self.beta2, "of_g": of_g, "of_m": of_m, "root": root, "shift": self.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        return (g * c.of_g).add_(s.m * c.of_m).div_(denominator(s.v, c))


@dataclass(frozen=True, kw_only=True)
class RAdam(Rule):
    """RAdam: Adam whose second moment is used only once its variance is tractable (rho_t > 5).

    Liu et al. arXiv:1908.03265, as torch.optim.RAdam. With beta2 = 0.999 the first five steps are plain momentum.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-8

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"a1": 1 - self.beta1, "a2": 1 - self.beta2} | rectification(
            self.beta1, self.beta2, self.eps, t, lambda length: length > 5
        )

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        return (s.m * c.scale).div_(s.v.sqrt().mul_(c.on).add_(c.off))
