"""SPAM, dense and on a random part of each matrix that is drawn anew before every reset.

Huang et al. SPAM. arXiv:2501.06842. Sparse moments are kept dense and zero off the mask: the same numbers without
gathers. Departures: the authors' decay acts on a copy and is lost, here it acts (on whole matrices, after the step);
each entry is in the mask with chance `density`, independently.

Letters: k clients, P coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.rule import Beta, Count, Decay, Fixed, Named, Reach, Rule, Size, State, Whole
from fedsim.optim.rules.arithmetic import adam_coefficients, denominator, where
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class Spam(Rule):
    """SPAM: Adam (raw eps) whose moments are reset every `interval` steps and whose spikes are clipped.

    Huang et al. SPAM. arXiv:2501.06842, as the authors' code. Where g^2 > threshold * v, g = sign(g) * sqrt(threshold
    * v). The bias corrections keep the global t. `interval` far above a round's local steps needs `state_scope:
    client`.

    Args:
        threshold: theta, from how many times v on g^2 is a spike; 0 clips nothing.
        warmup: steps over which a cosine damps the step after a reset (N).
        guard: first steps, and after a reset, in which nothing is clipped.
    """

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Size = 1e-6
    threshold: Fixed = 5000.0
    interval: Count = 500
    warmup: Whole = 150
    guard: Whole = 20

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"))
    decay: ClassVar[Decay] = "decoupled_after"
    default_lr: ClassVar[float | None] = 1e-3

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        since = t % self.interval
        clips = (t >= self.guard) & (since >= self.guard) & (self.threshold > 0)
        warm = (t >= self.interval) & (since < self.warmup)
        damping = 1 - 0.99 * (1 + np.cos(np.pi * since / (self.warmup + 1))) / 2
        return adam_coefficients(self.beta1, self.beta2, self.eps, t, raw=True) | {
            "keep": where(since == 0, 0.0, 1.0),
            "threshold": where(clips, self.threshold, 1.0),
            "unclipped": where(clips, 0.0, np.inf),
            "damping": where(warm, damping, 1.0),
        }

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        return spam_direction(g, s.m, s.v, c)


def spam_direction(g: Tensor, m: Tensor, v: Tensor, c: Named) -> Tensor:
    """One step of SPAM's moments and its direction."""
    m.mul_(c.keep)
    v.mul_(c.keep)
    limit = (v * c.threshold + c.unclipped).sqrt_()
    g = g.clamp(-limit, limit)
    m.lerp_(g, c.a1)
    v.lerp_(g * g, c.a2)
    return (m * c.damping).div_(denominator(v, c))


@dataclass(frozen=True, kw_only=True)
class SparseSpam(Spam):
    """SPAM on a mask per matrix, drawn at t = 1, interval - 1, 2 * interval - 1, ...; vectors stay dense.

    Args:
        density: share of a matrix's entries in the mask (d), below 1.
    """

    density: float = 0.5

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"), State("on"))
    inputs: ClassVar[tuple[str, ...]] = ("noise",)
    reach: ClassVar[Reach] = "tensor"

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise ValueError(f"density must lie in (0, 1), got {self.density}; the dense rule is spam")

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        return ("noise",) if bool(((t == 1) | ((t + 1) % self.interval == 0)).any()) else ()

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        draws = where((t == 1) | ((t + 1) % self.interval == 0), 1.0, 0.0)
        return {**super().coefficients(t, lr, host), "draws": draws, "limit": NormalDist().inv_cdf(self.density)}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        if hasattr(s, "noise"):
            fresh = (s.noise < c.limit) | ~seg.expand(seg.is_matrix(g).expand(len(g), -1))
            s.on.lerp_(fresh.to(s.on.dtype), c.draws)
            s.m.mul_(s.on)
            s.v.mul_(s.on)
        return torch.mul(spam_direction(g * s.on, s.m, s.v, c), s.on)
