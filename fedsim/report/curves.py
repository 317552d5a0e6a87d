"""One quantity against rounds, virtual time and bits: a panel for each that the run has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim.history import History, axis_scale
from fedsim.report.draw import Curve, line_panel
from fedsim.report.page import Picture

AXES = {"round": "by round", "virtual_seconds": "by virtual time", "bits_up": "by bits sent"}


def over_each_axis(history: History, keys: Sequence[str], *, percent: bool = False, log: bool = False) -> list[Picture]:
    """Panels of `keys` (coloured in order) against each axis of the run that moves; none if no row has the keys."""
    pictures = []
    for axis, title in AXES.items():
        pairs = [history.pairs(axis, key) for key in keys]
        largest = max((float(x.max()) for x, _ in pairs if len(x)), default=0.0)
        if not any(np.isfinite(y).any() for _, y in pairs) or (axis != "round" and largest <= 0):
            continue  # no clock was simulated, or nothing was counted: there is nothing to plot against
        scale, label = axis_scale(axis, largest)
        curves = [Curve(x=x / scale, y=y, colour=f"c{i + 1}") for i, (x, y) in enumerate(pairs)]
        steep = log or wants_log([y for _, y in pairs])
        alt = f"{' and '.join(key.replace('_', ' ') for key in keys)} against {label}"
        svg = line_panel(curves, x_label=label, alt=alt, percent=percent, log=steep and not percent)
        pictures.append(Picture(title=title[0].upper() + title[1:], svg=svg))
    return pictures


def wants_log(series: Sequence[np.ndarray]) -> bool:
    """Whether positive values span more than a factor of 200, so that a straight axis would show a cliff."""
    values = np.concatenate([y[np.isfinite(y)] for y in series]) if series else np.zeros(0)
    return len(values) > 0 and values.min() > 0 and float(values.max() / values.min()) > 200
