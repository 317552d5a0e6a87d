"""Learning-rate schedules.

A schedule is a factor on the base learning rate as a function of k = 0, 1, ..., counted in rounds (so that all clients
of a round share it), local steps, or thousandths of the training done. Closed forms, as torch's lr_scheduler has them;
warm-up, inverse square root (Vaswani et al. arXiv:1706.03762) and warm-up, stable, decay (Hu et al. arXiv:2404.06395).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import Literal

Name = Literal[
    "constant", "step", "multi_step", "exponential", "cosine", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]
_THOUSAND = 1000


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor on the learning rate.

    >>> Schedule(name="cosine", length=10).factor(5)
    0.5
    >>> Schedule(name="constant", warmup=4, warmup_from=0.0).factor(1)
    0.25

    Args:
        name: the shape after warm-up.
        unit: what k counts: `rounds`, `steps`, or `fraction` (thousandths of the training).
        length: K, where cosine and polynomial end, and warmup_stable_decay reaches zero.
        every: s of `step`.
        at: milestones of `multi_step`.
        gamma: factor per step, milestone or k of `step`, `multi_step`, `exponential`.
        power: p of `polynomial`.
        floor: the least factor, eta_min / eta, of `cosine`.
        warmup: w, over which the factor rises linearly from `warmup_from` to 1 (`inverse_sqrt` has its own rise).
        warmup_from: the factor at k = 0.
        decay: share of `length` that warmup_stable_decay falls over.
        shape: `linear` or `sqrt` fall of warmup_stable_decay.
    """

    name: Name = "constant"
    unit: Literal["rounds", "steps", "fraction"] = "rounds"
    length: int | None = None
    every: int = 1
    at: tuple[int, ...] = ()
    gamma: float = 0.1
    power: float = 1.0
    floor: float = 0.0
    warmup: int = 0
    warmup_from: float = 0.0
    decay: float = 0.2
    shape: Literal["linear", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        if self.name in ("cosine", "polynomial", "warmup_stable_decay") and (self.length is None or self.length < 1):
            raise ValueError(f"length must be a positive count for {self.name}, got {self.length!r}")
        if self.every < 1 or self.warmup < 0:
            raise ValueError(f"every must be >= 1 and warmup >= 0, got {self.every} and {self.warmup}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a share of length in (0, 1], got {self.decay}")

    def at_step(self, *, rounds: int, steps: int, fraction: float = 0.0) -> float:
        """The factor, given all three counters; the schedule reads the one it counts in."""
        if self.unit == "fraction":
            return self.factor(fraction * _THOUSAND)
        return self.factor(rounds if self.unit == "rounds" else steps)

    def factor(self, k: float) -> float:
        """The factor at k."""
        if self.name == "inverse_sqrt":
            w = max(self.warmup, 1)
            return min((k + 1) / w, sqrt(w / (k + 1)))
        rise = self.warmup_from + (1 - self.warmup_from) * k / self.warmup if k < self.warmup else 1.0
        return rise * self._shape(k)

    def _shape(self, k: float) -> float:
        if self.name == "step":
            return self.gamma ** (k // self.every)
        if self.name == "multi_step":
            return self.gamma ** sum(k >= milestone for milestone in self.at)
        if self.name == "exponential":
            return self.gamma**k
        if self.name == "constant":
            return 1.0
        assert self.length is not None
        done = min(k / self.length, 1.0)
        if self.name == "cosine":
            return self.floor + (1 - self.floor) * (1 + cos(pi * done)) / 2
        if self.name == "polynomial":
            return (1 - done) ** self.power
        fall = max(done - (1 - self.decay), 0.0) / self.decay
        return 1 - (sqrt(fall) if self.shape == "sqrt" else fall)
