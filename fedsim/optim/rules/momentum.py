"""Rules that follow the gradient, a momentum or a sign: SGD in all its forms, sign descent, Lion, Langevin noise.

x parameter, g gradient, m momentum, t the client's step (1 first), lr the learning rate eta. Each rule returns u for
x -= lr * u. Defaults are the sources'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Decay, Named, Reach, Rule, Share, Size, State, Within
from fedsim.optim.rules.arithmetic import nonzero, scaled, where
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Sgd(Rule):
    """SGD: m = momentum * m + (1 - dampening) * g (m = g at the first step); u = m, or g + momentum * m (Nesterov).

    As torch.optim.SGD. `ema` takes m = momentum * m + (1 - momentum) * g from zero (MoNNA, Muon, SGD-SaI), and
    Nesterov's form of it, u = momentum * m + (1 - momentum) * g.

    Args:
        dampening: share of each gradient after the first that m does not take.
        ema: make m a running mean from zero.
    """

    momentum: Share = 0.0
    dampening: Share = 0.0
    nesterov: bool = False
    ema: bool = False

    states: ClassVar[tuple[State, ...]] = (State("m"),)

    def __post_init__(self) -> None:
        if self.nesterov and not self.ema and self.dampening != 0:
            raise ValueError(f"nesterov needs dampening=0, got {self.dampening}")
        if self.ema and self.dampening != 0:
            raise ValueError(f"ema has no dampening, got {self.dampening}; leave it out")

    @property
    def is_descent(self) -> bool:
        return isinstance(self.momentum, float | int) and self.momentum == 0

    @property
    def heavy_ball(self) -> float | None:
        bare = not (self.nesterov or self.ema or self.dampening) and isinstance(self.momentum, float | int)
        return 0.0 if self.is_descent else float(self.momentum) if bare else None

    def active_states(self) -> tuple[State, ...]:
        return () if self.is_descent else self.states

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        if self.is_descent:
            return {}
        taken = 1 - (self.momentum if self.ema else where(t > 1, self.dampening, 0.0))
        return {"keep": self.momentum, "take": taken}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        if self.is_descent:
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

    Args:
        beta1: share of m in the mean whose sign is the step.
        beta2: share of m that it keeps after the step.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.99

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-4

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"a1": 1 - self.beta1, "a2": 1 - self.beta2}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        u = s.m.lerp(g, c.a1).sign_()
        s.m.lerp_(g, c.a2)
        return u


@dataclass(frozen=True, kw_only=True)
class LionK(Lion):
    """Lion-kappa: u = grad kappa(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g.

    Chen, Liu, Liang, Liu. arXiv:2310.05898.

    Args:
        kappa: what grad kappa(c) is: `sign` (Lion); `identity` (momentum); `dead_zone`, sign(c) where abs(c) > e;
            `huber`, clip(c / e, -1, 1); `lp`, sign(c) * (abs(c) / norm_p(c))^(p - 1) per tensor; `group`, c / norm(c)
            per tensor; `top_k`, the sign of the largest `fraction` of a client's entries.
        e: half width of `dead_zone` and of `huber`'s straight part.
        p: of `lp`'s norm, above 1.
        fraction: of a client's entries that `top_k` moves.
    """

    kappa: Literal["sign", "identity", "dead_zone", "huber", "lp", "group", "top_k"] = "sign"
    e: float = 1e-3
    p: float = 1.5
    fraction: Annotated[float, Within(0, 1, closed=True)] = 0.1

    reach: ClassVar[Reach] = "tensor"

    def __post_init__(self) -> None:
        if self.e <= 0 or self.p <= 1 or self.fraction <= 0:
            raise ValueError(
                f"this rule needs e > 0, p > 1, fraction > 0; got e={self.e}, p={self.p}, fraction={self.fraction}"
            )

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        u = self._gradient(s.m.lerp(g, c.a1), seg)
        s.m.lerp_(g, c.a2)
        return u

    def _gradient(self, c: Tensor, seg: Segments) -> Tensor:
        if self.kappa == "identity":
            return c
        if self.kappa == "huber":
            return (c / self.e).clamp_(-1, 1)
        if self.kappa == "group":
            return c / seg.expand(nonzero(seg.norms(c)))
        if self.kappa == "lp":
            size = nonzero(seg.sums(c.abs() ** self.p) ** (1 / self.p))
            return c.sign() * (c.abs() / seg.expand(size)) ** (self.p - 1)
        if self.kappa == "dead_zone":
            return c.sign() * (c.abs() > self.e)
        if self.kappa == "top_k":
            kept = torch.topk(c.abs(), max(1, int(self.fraction * c.shape[1])), dim=1).values
            return c.sign() * (c.abs() >= kept[:, -1:])
        return c.sign()


@dataclass(frozen=True, kw_only=True)
class SignSgd(Rule):
    """signSGD: u = sign(g). Bernstein, Wang, Azizzadenesheli, Anandkumar. arXiv:1802.04434."""

    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-3

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return g.sign()


@dataclass(frozen=True, kw_only=True)
class Signum(Rule):
    """Signum: u = sign(m), m = momentum * m + (1 - momentum) * g. Bernstein et al. arXiv:1802.04434."""

    momentum: Beta = 0.9

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"a": 1 - self.momentum}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return s.m.lerp_(g, c.a).sign()


@dataclass(frozen=True, kw_only=True)
class Optimistic(Rule):
    """Optimistic descent: u = 2 * g - g_prev, and u = g at the first step.

    Rakhlin, Sridharan. Optimization, learning, and games with predictable sequences. arXiv:1311.1869.
    """

    states: ClassVar[tuple[State, ...]] = (State("g_prev"),)

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"later": where(t > 1, 1.0, 0.0)}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        u = g + (g - s.g_prev) * c.later
        s.g_prev.copy_(g)
        return u


@dataclass(frozen=True, kw_only=True)
class ExponentiatedGradient(Rule):
    """Exponentiated gradient: x = x * exp(-lr * sign(x) * g), the exponent clipped to [-1, 1].

    Cornford et al. Brain-like learning with exponentiated gradients (2024), after Kivinen, Warmuth (1997). Signs never
    change and zeros stay, which suits networks under Dale's law.
    """

    decay: ClassVar[Decay] = "decoupled"
    owns_lr: ClassVar[bool] = True

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return -x * torch.expm1((-x.sign() * g * c.lr).clamp_(-1, 1))


@dataclass(frozen=True, kw_only=True)
class Sgld(Rule):
    """Stochastic gradient Langevin dynamics: x -= lr/2 * (num_data * g + prior * x) + sqrt(lr * temperature) * z.

    Welling, Teh. Bayesian learning via stochastic gradient Langevin dynamics. ICML 2011. z is standard normal.

    Args:
        num_data: N, how many samples there are; g is the gradient of their mean loss.
        prior: precision of the Gaussian prior; 0 for a flat one.
        temperature: scale of the noise; 1 samples the posterior.
    """

    num_data: Size = 1.0
    prior: Size = 0.0
    temperature: Size = 1.0

    inputs: ClassVar[tuple[str, ...]] = ("noise",)
    owns_lr: ClassVar[bool] = True

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"n": self.num_data, "prior": self.prior, "heat": np.sqrt(self.temperature)}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return (g * c.n + x * c.prior) * (c.lr / 2) - s.noise * (c.lr**0.5 * c.heat)


@dataclass(frozen=True, kw_only=True)
class Sghmc(Rule):
    """Stochastic gradient Hamiltonian Monte Carlo: m = (1 - a) * m - lr * g + sqrt(2 a lr temperature) * z; x += m.

    Chen, Fox, Guestrin. arXiv:1402.4102. Give the gradient's scale (number of data) through lr.

    Args:
        friction: a, the share of m that a step loses.
        temperature: scale of the noise; 1 samples the posterior.
    """

    friction: Share = 0.1
    temperature: Size = 1.0

    states: ClassVar[tuple[State, ...]] = (State("m"),)
    inputs: ClassVar[tuple[str, ...]] = ("noise",)
    owns_lr: ClassVar[bool] = True

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {"keep": 1 - self.friction, "heat": np.sqrt(2 * self.friction * self.temperature)}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return -s.m.mul_(c.keep).sub_(g * c.lr).add_(s.noise * (c.lr**0.5 * c.heat))
