"""Elementwise rules with a running second moment: Adam and its forms, Adagrad, RMSprop.

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


def adam_coefficients(h: Named, t: Any, *, raw: bool = False) -> dict[str, Any]:
    """What Adam-like rules need; `root` and `shift` make `denominator` contain the bias corrections of m and v."""
    bc1, bc2 = 1 - h.beta1**t, 1 - h.beta2**t
    root = bc1 / np.sqrt(bc2)
    shift = root * h.eps if raw else bc1 * h.eps
    own = {"a1": 1 - h.beta1, "a2": 1 - h.beta2, "root": root, "shift": shift}
    return own | {"t": t, "beta1": h.beta1, "beta2": h.beta2, "eps": h.eps, "bc1": bc1, "bc2": bc2}


def denominator(v: Tensor, c: Named) -> Tensor:
    """bc1 * (sqrt(v / bc2) + eps), so that m divided by it is Adam's direction."""
    return v.sqrt().mul_(c.root).add_(c.shift)
