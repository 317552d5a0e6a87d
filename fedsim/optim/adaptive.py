"""Elementwise rules with a running second moment: Adam, NAdam, RAdam, Adagrad, RMSprop.

x parameter, g gradient, m and v its first and second moments, t the client's step (1 first), bc1 = 1 - beta1^t and
bc2 = 1 - beta2^t. Each rule returns u for x -= lr * u. With the few steps of one round bc2 makes all of these close to
sign descent when their state is fresh each round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.arithmetic import adam_coefficients, denominator, rectification, where
from fedsim.optim.rule import Hyper, Named, Rule, State, check_choice, check_range
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam: u = (m / bc1) / (sqrt(v / bc2) + eps), with m, v the running means of g and g^2.

    Kingma, Ba. Adam. arXiv:1412.6980. With `decay: decoupled` it is AdamW (Loshchilov, Hutter. Decoupled weight decay
    regularization. arXiv:1711.05101). `amsgrad` divides by the running maximum of the uncorrected v (Reddi et al.
    arXiv:1904.09237), as torch does. `eps_mode="raw"` is (sqrt(bc2) / bc1) * m / (sqrt(v) + eps), whose effective eps
    is eps / sqrt(bc2); GaLore and SPAM are built on that form.
    """

    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8
    amsgrad: bool = False
    eps_mode: str = "corrected"

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"), State("v_max"))
    default_lr: ClassVar[float | None] = 1e-3

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta1", "beta2")
        check_range(self, 0, float("inf"), "eps")
        check_choice(self, "eps_mode", ("corrected", "raw"))

    def active_states(self) -> tuple[State, ...]:
        return self.states if self.amsgrad else self.states[:2]

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        return adam_coefficients(h, t, raw=self.eps_mode == "raw")

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        v = torch.maximum(s.v_max, s.v, out=s.v_max) if self.amsgrad else s.v
        return s.m / denominator(v, c)


@dataclass(frozen=True, kw_only=True)
class Adagrad(Rule):
    """Adagrad: a += g^2; u = g / (sqrt(a) + eps), with lr / (1 + (t - 1) * lr_decay).

    Duchi, Hazan, Singer. Adaptive subgradient methods. JMLR 12 (2011).
    """

    eps: Hyper = 1e-10
    lr_decay: Hyper = 0.0
    init: float = 0.0

    default_lr: ClassVar[float | None] = 0.01
    states: ClassVar[tuple[State, ...]] = (State("a"),)

    def __post_init__(self) -> None:
        check_range(self, 0, float("inf"), "eps", "lr_decay", "init")

    def active_states(self) -> tuple[State, ...]:
        return (State("a", init=self.init),)

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        slow = 1 + (t - 1) * h.lr_decay
        return {"slow": slow, "eps": h.eps * slow}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.a.add_(g * g)
        return g / s.a.sqrt().mul_(c.slow).add_(c.eps)


@dataclass(frozen=True, kw_only=True)
class RmsProp(Rule):
    """RMSprop: v = alpha * v + (1 - alpha) * g^2; u = g / (sqrt(v) + eps), or its momentum m = momentum * m + u.

    Tieleman, Hinton. Lecture 6.5 (2012), as torch.optim.RMSprop. `centered` subtracts the squared running mean of g
    inside the root.
    """

    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    momentum: Hyper = 0.0
    centered: bool = False

    states: ClassVar[tuple[State, ...]] = (State("v"), State("mean"), State("m"))
    default_lr: ClassVar[float | None] = 0.01

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "alpha", "momentum")
        check_range(self, 0, float("inf"), "eps")

    def active_states(self) -> tuple[State, ...]:
        kept = {"v": True, "mean": self.centered, "m": self.momentum != 0}
        return tuple(state for state in self.states if kept[state.name])

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        return {"a": 1 - h.alpha, "eps": h.eps, "keep": h.momentum}

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
    """

    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8
    momentum_decay: Hyper = 4e-3

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    host: ClassVar[tuple[str, ...]] = ("product",)
    default_lr: ClassVar[float | None] = 2e-3

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta1", "beta2")
        check_range(self, 0, float("inf"), "eps", "momentum_decay")

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        mu = h.beta1 * (1 - 0.5 * 0.96 ** (t * h.momentum_decay))
        mu_next = h.beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * h.momentum_decay))
        q.product = where(t > 1, q.product, 1.0) * mu
        of_g, of_m = (1 - mu) / (1 - q.product), mu_next / (1 - q.product * mu_next)
        root = 1 / np.sqrt(1 - h.beta2**t)
        return {"a1": 1 - h.beta1, "a2": 1 - h.beta2, "of_g": of_g, "of_m": of_m, "root": root, "shift": h.eps}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        return (g * c.of_g).add_(s.m * c.of_m).div_(denominator(s.v, c))


@dataclass(frozen=True, kw_only=True)
class RAdam(Rule):
    """RAdam: Adam whose second moment is used only once its variance is tractable (rho_t > 5).

    Liu et al. arXiv:1908.03265, as torch.optim.RAdam. With beta2 = 0.999 the first five steps are plain momentum.
    """

    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-8

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    default_lr: ClassVar[float | None] = 1e-3

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta1", "beta2")
        check_range(self, 0, float("inf"), "eps")

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        return {"a1": 1 - h.beta1, "a2": 1 - h.beta2} | rectification(h, t, lambda length: length > 5)

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        s.m.lerp_(g, c.a1)
        s.v.lerp_(g * g, c.a2)
        return (s.m * c.scale).div_(s.v.sqrt().mul_(c.on).add_(c.off))
