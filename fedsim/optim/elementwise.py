"""Elementwise rules that follow the gradient, a momentum or a sign: SGD in all its forms, Lion.

x parameter, g gradient, m momentum, t the client's step (1 first), lr the learning rate eta. Each rule returns u for
x -= lr * u. Defaults are the sources'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from fedsim.optim.rule import Hyper, Named, Rule, State, check_range
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Sgd(Rule):
    """SGD: m = momentum * m + (1 - dampening) * g (m = g at the first step); u = m, or g + momentum * m (Nesterov).

    As torch.optim.SGD. `ema` takes m = momentum * m + (1 - momentum) * g from zero (MoNNA, Muon, SGD-SaI), and
    Nesterov's form of it, u = momentum * m + (1 - momentum) * g.
    """

    momentum: Hyper = 0.0
    dampening: Hyper = 0.0
    nesterov: bool = False
    ema: bool = False

    states: ClassVar[tuple[State, ...]] = (State("m"),)

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "momentum", "dampening", open_high=False)
        if self.nesterov and not self.ema and self.dampening != 0:
            raise ValueError(f"Sgd.nesterov needs dampening=0, got {self.dampening}")
        if self.ema and self.dampening != 0:
            raise ValueError(f"Sgd.ema has no dampening, got {self.dampening}; leave it out")

    def active_states(self) -> tuple[State, ...]:
        return self.states if self.momentum != 0 else ()

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        if self.momentum == 0:
            return {}
        taken = 1 - (h.momentum if self.ema else where(t > 1, h.dampening, 0.0))
        return {"keep": h.momentum, "take": taken}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        if self.momentum == 0:
            return g
        m = s.m.mul_(c.keep).add_(scaled(g, c.take))
        if not self.nesterov:
            return m
        return scaled(g, c.take if self.ema else 1.0) + m * c.keep


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Lion: u = sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g.

    Chen et al. Symbolic discovery of optimization algorithms. arXiv:2302.06675. With decay lambda it minimises the loss
    on the box of entries at most 1 / lambda: Chen, Liu, Liang, Liu. Lion secretly solves constrained optimization.
    arXiv:2310.05898.
    """

    beta1: Hyper = 0.9
    beta2: Hyper = 0.99

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    decay: ClassVar[str] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-4

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "beta1", "beta2")

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        return {"a1": 1 - h.beta1, "a2": 1 - h.beta2}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        u = s.m.lerp(g, c.a1).sign_()
        s.m.lerp_(g, c.a2)
        return u


def where(condition: Any, yes: Any, no: Any) -> Any:
    """numpy.where that keeps plain numbers plain."""
    if isinstance(condition, bool):
        return yes if condition else no
    return np.where(condition, yes, no)


def scaled(g: Tensor, factor: Tensor | float) -> Tensor:
    """g * factor, without a copy when the factor is the number one."""
    return g if isinstance(factor, float | int) and factor == 1 else g * factor
