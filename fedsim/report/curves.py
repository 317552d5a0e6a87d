"""Quantities against rounds, virtual time and bits: a panel for each that the runs have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.history import History, axis_scale
from fedsim.report.draw import Curve, line_panel, look
from fedsim.report.page import Picture

AXES = {"round": "By round", "virtual_seconds": "By virtual time", "bits_up": "By bits sent"}
Points = tuple[np.ndarray, np.ndarray]
_GRID = 200
_FAR_APART = 8  # times more bits than another run: a straight axis would press that one against the left


def over_each_axis(lines: Sequence[tuple[Sequence[History], str]], *, log: bool = False) -> list[Picture]:
    """Panels of lines against each axis that moves; none if no row has their keys.

    Args:
        lines: (runs, key): the points of one run, or the mean of several; left out where a run has none.
        log: draw y on a logarithmic axis; one that shows shares never has it, others also where y falls off a cliff.
    """
    keys = list(dict.fromkeys(key for _, key in lines))
    percent = any("accuracy" in key for key in keys)
    pictures = []
    for axis, title in AXES.items():
        points = [[run.pairs(axis, key) for run in runs] for runs, key in lines]
        present = [(x, y) for each in points for x, y in each if len(x)]
        ends = [float(x.max()) for x, _ in present]
        if not any(np.isfinite(y).any() for _, y in present) or (axis != "round" and max(ends) <= 0):
            continue  # no clock was simulated, or nothing was counted: there is nothing to plot against
        scale, label = axis_scale(axis, max(ends))
        curves = [_curve(each, i, scale) for i, each in enumerate(points) if all(len(x) for x, _ in each)]
        steep = not percent and (log or wants_log([y for _, y in present]))
        alt = f"{' and '.join(key.replace('_', ' ') for key in keys)} against {label}"
        log_x = axis == "bits_up" and min(ends) > 0 and max(ends) / min(ends) > _FAR_APART
        label += ", logarithmic" if log_x else ""
        svg = line_panel(curves, x_label=label, alt=alt, percent=percent, log=steep, log_x=log_x)
        pictures.append(Picture(title=title, svg=svg))
    return pictures


def _curve(runs: Sequence[Points], index: int, scale: float) -> Curve:
    """One run's own points, or the mean of several with a band of one standard deviation where all of them are."""
    if len(runs) == 1:
        return Curve(x=runs[0][0] / scale, y=runs[0][1], **look(index))
    first, end = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    same = all(np.array_equal(x, runs[0][0]) for x, _ in runs)
    # Seeds that ended apart are compared where all of them ran.
    grid = runs[0][0] if same else np.linspace(first, max(first, end), _GRID)
    values = np.stack([np.interp(grid, x, y) for x, y in runs])
    mean, std = values.mean(0), values.std(0, ddof=1)
    return Curve(x=grid / scale, y=mean, low=mean - std, high=mean + std, **look(index))


def wants_log(series: Sequence[np.ndarray]) -> bool:
    """Whether positive values span more than a factor of 200, so that a straight axis would show a cliff."""
    values = np.concatenate([y[np.isfinite(y)] for y in series]) if series else np.zeros(0)
    return len(values) > 0 and values.min() > 0 and float(values.max() / values.min()) > 200
