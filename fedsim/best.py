"""The best model of a run so far, by a metric of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import Tensor

from fedsim.config import ConfigError, did_you_mean
from fedsim.metrics import small_is_good


@dataclass(frozen=True)
class Best:
    """Where a metric was best.

    Args:
        metric: its name.
        round: the first with that value.
        value: of the metric.
        x: [P], the server's model then; None if it was not kept, since only a resume named the metric.
    """

    metric: str
    round: int
    value: float
    x: Tensor | None


def best_of(best: Best | None, metric: str, row: Mapping[str, Any], x: Tensor | None) -> Best | None:
    """The better of what was best so far and of a row, whose model is x [P]; a row without the metric is none."""
    value = row.get(metric)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return best
    if best is not None and not _better(metric, value, best.value):
        return best
    return Best(metric, row["round"], value, None if x is None else x.detach().clone())


def check_named(metric: str, row: Mapping[str, Any]) -> None:
    """Refuse a metric that an evaluated row lacks.

    Raises:
        ConfigError: naming those that there are.
    """
    known = [k for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    if metric not in known:
        raise ConfigError(f"checkpoint.best: evaluated rounds have no number {metric!r}{did_you_mean(metric, known)}")


def best_row(rows: Iterable[Mapping[str, Any]], metric: str) -> Mapping[str, Any] | None:
    """The first row in which the metric is best, by the same rule; None if no row has a number for it."""
    best: Mapping[str, Any] | None = None
    for row in rows:
        value = row.get(metric)
        if value is not None and isfinite(value) and (best is None or _better(metric, value, best[metric])):
            best = row
    return best


def _better(metric: str, value: float, than: float) -> bool:
    return value < than if small_is_good(metric) else value > than
