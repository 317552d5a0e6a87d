"""A sweep's target for every pair of values of two keys, and the worst of every row and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import inf, isfinite
from typing import Any

import numpy as np

from fedsim.history import show
from fedsim.report.draw import value_map
from fedsim.report.page import Picture
from fedsim.sweep.results import Row

MAX_VALUES = 16  # of a key, or cells are too small to read
MAX_PAIRS = 3


def maps(rows: Sequence[Row], axes: Mapping[str, Sequence[Any]], target: str, minimise: bool) -> list[Picture]:
    """A picture for every two keys; of several settings with the same pair the best one counts.

    Args:
        rows: every setting, the best first.
        axes: {key: its values in the order to show}; the first key goes down, the second across.
        target: the metric.
        minimise: whether a small one is good.
    """
    shown = {key: list(map(label, values)) for key, values in axes.items() if 1 < len(values) <= MAX_VALUES}
    pairs = list(combinations(shown, 2))[:MAX_PAIRS]
    return [_map(rows, (down, across), shown, target, minimise) for down, across in pairs]


def label(value: Any) -> str:
    """A value of the file in few letters.

    >>> label({"name": "trimmed_mean", "f": 4}), label([20, 50]), label(0.1)
    ('trimmed_mean f=4', '20, 50', '0.1')
    """
    if isinstance(value, Mapping):
        more = (f"{key}={label(v)}" for key, v in value.items() if key != "name")
        return " ".join([*([str(value["name"])] if "name" in value else []), *more])
    if isinstance(value, list | tuple):
        return ", ".join(map(label, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _map(
    rows: Sequence[Row], keys: tuple[str, str], shown: Mapping[str, Sequence[str]], target: str, minimise: bool
) -> Picture:
    down, across = keys
    sign = -1.0 if minimise else 1.0  # times it, more is better
    means = np.full((len(shown[down]) + 1, len(shown[across]) + 1), np.nan)
    worst = means.copy()
    best = {tuple(label(row.setting.values.get(key)) for key in keys): row for row in reversed(rows)}
    for i, j in np.ndindex(len(shown[down]), len(shown[across])):
        row = best.get((shown[down][i], shown[across][j]))
        if row is not None and row.value is not None:
            means[i, j] = sign * row.value
            worst[i, j] = np.nan if row.worst is None else sign * row.worst
    ended = np.isfinite(worst[:-1, :-1])
    for values in (means, worst):
        inner = np.where(ended, values[:-1, :-1], -inf)
        values[-1, :-1], values[:-1, -1], values[-1, -1] = inner.min(0), inner.min(1), inner.min()
        values[values == -inf] = np.nan
    found = means[np.isfinite(means)]
    low, wide = (found.min(), np.ptp(found) or 1.0) if len(found) else (0.0, 1.0)
    svg = value_map(
        (means - low) / wide,
        [
            [_lines(sign * m, sign * w, target, minimise) for m, w in zip(*pair, strict=True)]
            for pair in zip(means, worst, strict=True)
        ],
        rows=[*shown[down], "worst"],
        columns=[*shown[across], "worst"],
        x_label=across,
        y_label=down,
        alt=f"{target} for each {down} and {across}",
    )
    return Picture(title=f"{down} by {across}", svg=svg, wide=True)


def _lines(mean: float, worst: float, target: str, minimise: bool) -> list[str]:
    if not isfinite(mean):
        return ["–"]
    word = "max" if minimise else "min"
    return [show(target, mean), f"{word} {show(target, worst)}" if isfinite(worst) else "not all ended"]
