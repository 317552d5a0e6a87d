"""Metrics that add up: each name is a weighted total and its weight, so stacks, workers and rounds merge by `+`.

Three kinds of value live side by side: weighted means (a loss over samples), counts that sum (clients that
replied), and values of which the latest stands (a staleness, the point `x`). Sums run in float64 in the order of
the additions, so merging stacks in stack order gives the same bits for any number of workers.

Letters: C clients in a stack, N clients in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import TypeAlias

import torch
from torch import Tensor

from fedsim.config import ConfigError

Value: TypeAlias = float | int | list[float]

RESERVED = frozenset(
    "round virtual_seconds wall_seconds bits_up bits_down num_clients staleness_mean nonfinite "
    "test_loss test_accuracy distance x "
    "client_loss_mean client_loss_std client_loss_worst_decile "
    "client_accuracy_mean client_accuracy_std client_accuracy_worst_decile".split()
)
"""Names that a row gets from the loop, the fleet and the evaluation: no strategy and no client half may use them."""


def check_names(names: Iterable[str], owner: str) -> None:
    """Refuse metrics that would overwrite those of the ledger or the evaluation.

    Raises:
        ConfigError: naming the metric and its owner.
    """
    if taken := sorted(RESERVED.intersection(names)):
        raise ConfigError(f"{owner}: metric {taken[0]!r} is reserved (fedsim itself reports it); give it another name")


@dataclass(frozen=True)
class Metrics:
    """Named values that merge by `+`.

    Args:
        means: name -> (sum of weight x value, sum of weights).
        counts: name -> a number that sums.
        latest: name -> a number or a list of numbers; of two, the right one stands.

    >>> a = Metrics.of(3, loss=1.0) + Metrics.of(1, loss=5.0) + Metrics.count(num_clients=2)
    >>> a.values()
    {'loss': 2.0, 'num_clients': 2}
    """

    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    latest: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in {*self.means} & {*self.counts} | {*self.means, *self.counts} & {*self.latest}:
            raise ValueError(f"metric '{name}' is given as two kinds (mean, count, latest); rename one of them")

    @classmethod
    def of(cls, weight: float, /, **values: float | Tensor) -> Metrics:
        """Means over `weight` samples each. A weight of 0 says nothing, whatever the value (it may be NaN).

        Raises:
            ValueError: if the weight is negative or not finite.
        """
        w = _checked(float(weight))
        return cls(means={k: (float(v) * w if w else 0.0, w) for k, v in values.items()})

    @classmethod
    def mean_over(cls, values: Tensor, weights: Tensor, *, name: str) -> Metrics:
        """The weighted mean over the clients of a stack: values [C], weights [C] (0 leaves a client out)."""
        w = weights.detach().to("cpu", torch.float64)
        _checked(float(w.min()) if w.numel() else 0.0)
        v = values.detach().to("cpu", torch.float64)
        # A client without samples has no mean of its own; its NaN must not spoil the others'.
        total = torch.where(w > 0, v * w, torch.zeros_like(v)).sum()
        return cls(means={name: (float(total), _checked(float(w.sum())))})

    @classmethod
    def count(cls, **values: float) -> Metrics:
        """Numbers that sum."""
        return cls(counts=values)

    @classmethod
    def last(cls, **values: Value) -> Metrics:
        """Numbers, or short lists of numbers, of which the latest stands."""
        return cls(latest=values)

    def __add__(self, other: Metrics) -> Metrics:
        means = dict(self.means)
        for name, (total, weight) in other.means.items():
            so_far = means.get(name, (0.0, 0.0))
            means[name] = (so_far[0] + total, so_far[1] + weight)
        counts = dict(self.counts)
        for name, value in other.counts.items():
            counts[name] = counts.get(name, 0) + value
        return Metrics(means, counts, {**self.latest, **other.latest})

    def mean(self, name: str) -> float:
        """One weighted mean; KeyError if it is unknown, NaN if nothing has been weighed yet."""
        total, weight = self.means[name]
        return total / weight if weight else float("nan")

    def values(self) -> dict[str, Value]:
        """Every name with its value; a mean over nothing (weight 0) is left out."""
        means: dict[str, Value] = {name: total / weight for name, (total, weight) in self.means.items() if weight}
        return {**means, **self.counts, **self.latest}


def spread(values: Tensor, weights: Tensor | None = None, *, higher_is_better: bool = True) -> dict[str, float]:
    """How a value differs over clients.

    Args:
        values: [N], each client's own mean (accuracy, loss).
        weights: [N] >= 0; clients of weight 0 (nothing to evaluate on) are left out. None: all count alike.
        higher_is_better: False for a loss, whose worst clients have the largest value.

    Returns:
        {"mean", "std", "worst_decile"}: weighted mean, weighted population standard deviation, and the weighted
        mean of the worst ceil(n / 10) of the n clients left. Empty if none is left. NaN is worse than any number.

    >>> spread(torch.tensor([0.5, 1.0]))
    {'mean': 0.75, 'std': 0.25, 'worst_decile': 0.5}
    """
    v = values.detach().to("cpu", torch.float64)
    w = torch.ones_like(v) if weights is None else weights.detach().to("cpu", torch.float64)
    _checked(float(w.min()) if w.numel() else 0.0)
    v, w = v[w > 0], w[w > 0]
    if not v.numel():
        return {}
    mean = (v * w).sum() / w.sum()
    std = ((v - mean).square() * w).sum().div(w.sum()).sqrt()
    badness = torch.where(v.isnan(), torch.inf, -v if higher_is_better else v)
    worst = torch.sort(badness, descending=True, stable=True).indices[: -(-v.numel() // 10)]
    decile = (v[worst] * w[worst]).sum() / w[worst].sum()
    return {"mean": float(mean), "std": float(std), "worst_decile": float(decile)}


def _checked(weight: float) -> float:
    if not (isfinite(weight) and weight >= 0):
        raise ValueError(f"weight of a metric must be finite and at least 0, got {weight}; pass a number of samples")
    return weight
