"""Metrics that add up: each name is a weighted total and its weight, so stacks, workers and rounds merge by `+`.

Two kinds of value live side by side: weighted means (a loss over samples) and counts that sum (clients that replied).
Sums run in float64 in the order of the additions, so merging stacks in stack order gives the same bits for any number
of workers.

Letters: C clients in a stack, N clients in all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.config import ConfigError

RESERVED = frozenset(
    "round virtual_seconds wall_seconds bits_up bits_down num_clients num_away num_dropped num_late num_failed "
    "num_refused staleness_mean nonfinite distance x".split()
)
"""Names that a row gets from the loop, the fleet and the task: no strategy and no client half may use them."""

EVALUATED = ("test_", "client_", "personal_", "global_")
"""How names begin that a row gets from the evaluation, whatever a task's metrics are called."""


SPREAD = ("mean", "std", "worst_decile")
"""How names end of what is said of a metric over clients (`spread`)."""

_SMALL = re.compile(
    r"loss|distance|error|perplexity|divergence|deviance|regret|brier|crps"
    r"|(^|_)(mae|mse|rmse|mape|nll|ece|bpc|wer|cer|kl|fid)(_|$)"
)


def small_is_good(name: str) -> bool:
    """Whether small values of a metric are good: of losses, distances and errors they are, going by the name.

    It is all that a row, a report or a bound knows of it; so the name is where the user says it (`as: ..._error`).

    >>> [small_is_good(name) for name in ("test_loss", "test_mae", "test_accuracy")]
    [True, True, False]
    """
    return _SMALL.search(name) is not None


def check_names(names: Iterable[str], owner: str) -> None:
    """Refuse metrics that would overwrite those of the ledger or the evaluation.

    Raises:
        ConfigError: naming the metric and its owner.
    """
    if taken := sorted(name for name in names if name in RESERVED or name.startswith(EVALUATED)):
        raise ConfigError(f"{owner}: metric {taken[0]!r} is reserved (fedsim itself reports it); give it another name")


def plain_numbers(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Metrics as plain numbers, or lists of them; tensors and arrays become such.

    Raises:
        ConfigError: naming a metric that is neither, and its owner.
    """
    out = {name: v.tolist() if isinstance(v, Tensor | np.ndarray | np.generic) else v for name, v in values.items()}
    for name, value in out.items():
        if not all(isinstance(v, int | float) for v in (value if isinstance(value, list | tuple) else [value])):
            found = type(values[name]).__name__
            raise ConfigError(f"{owner}: metric {name!r} is no number but a {found}; give a number, or a list of them")
    return out


@dataclass(frozen=True)
class Metrics:
    """Named values that merge by `+`.

    Args:
        means: name -> (sum of weight x value, sum of weights).
        counts: name -> a number that sums.

    >>> loss = Metrics.mean_over(torch.tensor([1.0, 5.0]), torch.tensor([3, 1]), name="loss")
    >>> (loss + Metrics.count(num_clients=2)).values()
    {'loss': 2.0, 'num_clients': 2}
    """

    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def mean_over(cls, values: Tensor, weights: Tensor, *, name: str) -> Metrics:
        """The weighted mean over the clients of a stack: values [C], weights [C] (0 leaves a client out).

        Raises:
            ValueError: if a weight is negative or not finite.
        """
        w = weights.detach().to("cpu", torch.float64)
        if not bool((torch.isfinite(w) & (w >= 0)).all()):
            raise ValueError(f"weights of a metric must be finite and at least 0, got {w.tolist()}; pass sample counts")
        v = values.detach().to("cpu", torch.float64)
        # A client without samples has no mean of its own; its NaN must not spoil the others'.
        total = torch.where(w > 0, v * w, torch.zeros_like(v)).sum()
        return cls(means={name: (float(total), float(w.sum()))})

    @classmethod
    def count(cls, **values: int) -> Metrics:
        """Numbers that sum."""
        return cls(counts=values)

    def __add__(self, other: Metrics) -> Metrics:
        means = dict(self.means)
        for name, (total, weight) in other.means.items():
            so_far = means.get(name, (0.0, 0.0))
            means[name] = (so_far[0] + total, so_far[1] + weight)
        counts = dict(self.counts)
        for name, value in other.counts.items():
            counts[name] = counts.get(name, 0) + value
        return Metrics(means, counts)

    def values(self) -> dict[str, float]:
        """Every name with its value; a mean over nothing (weight 0) is left out."""
        means = {name: total / weight for name, (total, weight) in self.means.items() if weight}
        return {**means, **self.counts}


def undefined(values: Tensor, losses: Tensor) -> Tensor:
    """Where a metric has no value although the loss has one: nothing counts (no label, no position to predict)."""
    return values.isnan() & losses.isfinite()


def without_value(row: Mapping[str, Any], name: str) -> bool:
    """Whether a metric of a row is NaN because nothing counts: it is one of held-out samples, whose loss is finite."""
    return name.startswith("test_") and isnan(row[name]) and isfinite(row.get("test_loss", nan))


def spread(values: Tensor, *, higher_is_better: bool = True) -> dict[str, float]:
    """How a value differs over clients.

    Args:
        values: [N], each client's own mean (accuracy, loss).
        higher_is_better: False for a loss, whose worst clients have the largest value.

    Returns:
        {"mean", "std", "worst_decile"}: mean, population standard deviation, and the mean of the worst ceil(N / 10).
        Empty for N = 0. NaN is worse than any number.

    >>> spread(torch.tensor([0.5, 1.0]))
    {'mean': 0.75, 'std': 0.25, 'worst_decile': 0.5}
    """
    v = values.detach().to("cpu", torch.float64)
    if not v.numel():
        return {}
    mean = v.sum() / len(v)
    std = (v - mean).square().sum().div(len(v)).sqrt()
    badness = torch.where(v.isnan(), torch.inf, -v if higher_is_better else v)
    worst = torch.sort(badness, descending=True, stable=True).indices[: -(-len(v) // 10)]
    return dict(zip(SPREAD, (float(mean), float(std), float(v[worst].sum() / len(worst))), strict=True))
