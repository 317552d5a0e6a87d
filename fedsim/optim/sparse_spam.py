"""SPAM with moments and steps on a random part of each matrix, drawn anew before every reset.

Huang et al. SPAM. arXiv:2501.06842. Moments are kept dense and zero off the mask: the same numbers without gathers.
Departures: the authors' decay acts on a copy and is lost, here it acts (on whole matrices, after the step); each entry
is in the mask with chance `density`, independently.

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

from fedsim.optim.adam_kin import Spam, spam_direction
from fedsim.optim.arithmetic import where
from fedsim.optim.rule import Hyper, Named, Rule, State
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class SparseSpam(Rule):
    """SPAM on a mask per matrix, drawn at t = 1, interval - 1, 2 * interval - 1, ...; vectors stay dense."""

    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    eps: Hyper = 1e-6
    threshold: float = 5000.0
    interval: int = 500
    warmup: int = 150
    guard: int = 20
    density: float = 0.5

    states: ClassVar[tuple[State, ...]] = (State("m"), State("v"), State("on"))
    inputs: ClassVar[tuple[str, ...]] = ("noise",)
    elementwise: ClassVar[bool] = False
    decay: ClassVar[str] = "decoupled_after"
    default_lr: ClassVar[float | None] = 1e-3

    def __post_init__(self) -> None:
        self._dense()
        if not 0 < self.density < 1:
            raise ValueError(f"SparseSpam.density must lie in (0, 1), got {self.density}; the dense rule is spam")

    def _dense(self) -> Spam:
        return Spam(
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            threshold=self.threshold,
            interval=self.interval,
            warmup=self.warmup,
            guard=self.guard,
        )

    def active_inputs(self, t: np.ndarray) -> tuple[str, ...]:
        return ("noise",) if bool(((t == 1) | ((t + 1) % self.interval == 0)).any()) else ()

    def coefficients(self, h: Named, t: Any, q: Named) -> Mapping[str, Any]:
        draws = where((t == 1) | ((t + 1) % self.interval == 0), 1.0, 0.0)
        return {**self._dense().coefficients(h, t, q), "draws": draws, "limit": NormalDist().inv_cdf(self.density)}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        if hasattr(s, "noise"):
            fresh = (s.noise < c.limit) | ~seg.expand(seg.is_matrix(g).expand(len(g), -1))
            s.on.lerp_(fresh.to(s.on.dtype), c.draws)
            s.m.mul_(s.on)
            s.v.mul_(s.on)
        return torch.mul(spam_direction(g * s.on, s.m, s.v, c), s.on)
