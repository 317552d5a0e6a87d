"""Drawing for the report: SVG whose colours are the page's own variables, so that it is readable light and dark.

A picture is written as text, shape by shape: a dozen of them take milliseconds, where loading a plotting library takes
longer than many a run. One unit of a picture is one CSS pixel at its natural size; y grows downward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.report.shapes import (
    Scale,
    abbreviated,
    bar_shape,
    bottom_axis,
    left_axis,
    limits,
    log_text,
    path_through,
    percent_text,
    png,
    stretches,
    svg,
    text_at,
    tick_text,
    upright_at,
)

PANEL = (340, 220)
NUM_COLOURS = 6
MAX_POINTS = 600
NUM_SHADES = 16


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel, with a band around it where `low` and `high` are given.

    Args:
        x, y, low, high: [n]; not finite values leave a gap.
        colour: a name of the page's palette, `c1` to `c6`, `muted` or `ink`.
        dash: 0 for a full line, 1 and 2 for broken ones.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    colour: str = "c1"
    dash: int = 0


def look(index: int) -> dict[str, Any]:
    """Colour and dash of the curve drawn at this place of many."""
    return {"colour": f"c{index % NUM_COLOURS + 1}", "dash": index // NUM_COLOURS % 3}


def line_panel(
    curves: Sequence[Curve],
    *,
    x_label: str,
    alt: str,
    percent: bool = False,
    counts: bool = False,
    log: bool = False,
    log_x: bool = False,
) -> str:
    """Curves over one x axis, as SVG.

    Args:
        curves: at least one, the first drawn on top; thinned to about 600 points each, extremes kept.
        x_label: with its unit.
        alt: what a screen reader says.
        percent: y is a share, shown times 100 and kept within 0 and 1.
        counts: y are numbers of something, on an axis from 0.
        log: logarithmic y (values of 0 or less are then left out), unless no value is above 0.
        log_x: the same for x.
    """
    log = log and any((curve.y > 0).any() for curve in curves)  # a distance of 0 all along has no logarithm
    bands = [band for curve in curves for band in (curve.low, curve.high) if band is not None and not log]
    low, high = limits([*(curve.y for curve in curves), *bands], log)
    if percent:
        low, high = max(low, 0.0), min(high, 1.0)
    left, right = limits([curve.x for curve in curves], log_x)
    if all((curve.x >= 0).all() for curve in curves) and not log_x:
        left = 0.0
    x, y = _panel(left, right, 0.0 if counts else low, high, log_x=log_x, log=log)
    return svg(
        PANEL,
        alt,
        left_axis(x, y, y.ticks(5), percent_text if percent else log_text if log else tick_text, grid=True),
        bottom_axis(x, y, x.ticks(6, whole=x_label == "round"), log_text if log_x else tick_text, x_label),
        *(_curve(curve, x, y) for curve in reversed(curves)),
    )


def histogram(values: np.ndarray, *, x_label: str, alt: str, percent: bool = False, whole: bool = False) -> str:
    """How many clients have which value, as SVG; a line marks the median.

    Args:
        values: [n] finite, n >= 1.
        percent: values are shares, shown times 100, on an axis that ends at 1.
        whole: values are whole numbers, and no bin is narrower than 1.
    """
    low, high = float(values.min()), float(values.max())
    if percent:  # whole tenths from the lowest up
        low, high = min(np.floor(10 * low) / 10, 0.9), 1.0
    if whole:
        width = max(1, -(-int(high - low + 1) // 30))
        edges = np.arange(low, high + 1 + width, width) - 0.5
    else:
        edges = np.linspace(low, high, 26) if high > low else np.array([low - 0.5, low + 0.5])
    found = np.histogram(values, edges)[0]
    x, y = _panel(*limits([edges], log=False), 0.0, 1.05 * found.max())
    middle = x(np.median(values))
    return svg(
        PANEL,
        alt,
        left_axis(x, y, y.ticks(5), tick_text, grid=True),
        bottom_axis(x, y, x.ticks(6, whole), percent_text if percent else tick_text, x_label),
        bar_shape(found, x(edges), y, "c1", 0.75),
        f'<path d="M{middle:.1f} {y.start:g}V{y.end:g}" stroke="var(--ink)" stroke-dasharray="3 2"/>',
    )


def heat_map(counts: np.ndarray, *, rows: Sequence[str] | None, x_label: str, y_label: str, alt: str, ids: bool) -> str:
    """A client-by-class picture, with a bar of each client's size above it, as SVG.

    Args:
        counts: [n clients, k classes], both at least 1 and small enough to see. The shade grows with the square root.
        rows: k names, or None for numbers.
        ids: the columns are clients 0 to n - 1, so number them.
    """
    n, k = counts.shape
    width, high = 700, float(np.clip(k * 32, 120, 380))
    left = 60 if rows is None else float(np.clip(24 + 6.5 * max(map(len, rows)), 60, 140))
    sizes = counts.sum(1)
    x, y = Scale(-0.5, n - 0.5, left, width - 12), Scale(k - 0.5, -0.5, high + 72, 72)
    above = Scale(0, max(1.05 * sizes.max(), 1), 60, 10)
    return svg(
        (width, high + 118),
        alt,
        left_axis(x, above, above.ticks(2), tick_text),
        bar_shape(sizes, x(np.arange(n + 1) - 0.5), above, "muted", 0.55),
        _cells(counts, x, y),
        left_axis(x, y, y.ticks(10, whole=True), tick_text, label=y_label)
        if rows is None
        else left_axis(x, y, np.arange(k), lambda v: abbreviated(rows[int(v)])),
        bottom_axis(x, y, x.ticks(10, whole=True) if ids else np.zeros(0), tick_text, x_label),
    )


def images(pixels: np.ndarray, *, alt: str) -> str:
    """Images side by side, row after row, as an <image> in SVG.

    Args:
        pixels: [rows, columns, height, width, 1 or 3] uint8.
        alt: what a screen reader says.
    """
    rows, columns, height, width, channels = pixels.shape
    gap = max(1, height // 8)
    sheet = np.zeros((rows, columns, height + gap, width + gap, channels + 1), np.uint8)  # see-through between them
    sheet[:, :, :height, :width, :-1], sheet[:, :, :height, :width, -1] = pixels, 255
    sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), columns * (width + gap), channels + 1)
    sheet = sheet[:-gap, :-gap]
    high, wide = sheet.shape[:2]
    scale = PANEL[0] / max(high, wide)
    place = f'width="{wide * scale:.1f}" height="{high * scale:.1f}" style="image-rendering: pixelated"'
    return svg((wide * scale, high * scale), alt, f'<image href="{png(sheet)}" {place}/>')


def network(places: np.ndarray, pairs: np.ndarray, *, alt: str) -> str:
    """Points and the lines between them, as SVG.

    Args:
        places: [n, 2] within -1 and 1.
        pairs: [2, E] which points are linked.
    """
    width = PANEL[0]
    x, y = Scale(-1.1, 1.1, 0, width)(places[:, 0]), Scale(-1.1, 1.1, width, 0)(places[:, 1])
    lines = "".join(f"M{x[i]:.1f} {y[i]:.1f}L{x[j]:.1f} {y[j]:.1f}" for i, j in pairs.T)
    points = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True))  # as long as their round ends
    size = float(np.clip(150 / len(places), 3, 8))
    return svg(
        (width, width),
        alt,
        f'<path d="{lines}" stroke="var(--muted)" stroke-width="0.7"/>',
        f'<path d="{points}" stroke="var(--c1)" stroke-width="{size:g}" stroke-linecap="round"/>',
    )


def value_map(
    shades: np.ndarray,
    texts: Sequence[Sequence[Sequence[str]]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    x_label: str,
    y_label: str,
    alt: str,
) -> str:
    """A value for each pair of two things, as SVG; the last row and the last column stand a little apart.

    Args:
        shades: [r, k] in 0 to 1, how full a cell's colour is; NaN for an empty one.
        texts: r times k, the lines that are written into a cell.
        rows, columns: r and k names.
        x_label, y_label: of what they are.
        alt: what a screen reader says.
    """
    (r, k), high, gap = shades.shape, 34.0, 8.0
    left = float(np.clip(30 + 6.2 * max(len(abbreviated(name)) for name in rows), 90, 150))
    wide = min((700 - left - 12 - gap) / k, 110.0)
    across, down = np.arange(k) * wide + left, np.arange(r) * high + 10
    across[-1] += gap
    down[-1] += gap
    parts, bottom = [], down[-1] + high
    for (i, j), shade in np.ndenumerate(shades):
        x, y = float(across[j]), float(down[i])
        if np.isfinite(shade):
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{high - 2:g}" rx="2" '
                f'fill="var(--c1)" fill-opacity="{0.06 + 0.5 * shade:.3g}"/>'
            )
        first = y + high / 2 + 4 - 6 * (len(texts[i][j]) - 1)
        for line, text in enumerate(texts[i][j]):
            style = ' font-size="9.5"' if line else ' fill="var(--ink)"'
            parts.append(text_at(x + wide / 2, first + 12 * line, text, "middle", style))
    parts += [
        text_at(left - 6, at + high / 2 + 4, abbreviated(name), "end")
        for at, name in zip(down.tolist(), rows, strict=True)
    ]
    for at, name in zip((across + wide / 2 + 4).tolist(), columns, strict=True):
        turned = f' transform="rotate(-28 {at:.1f} {bottom + 14:.1f})"'
        parts.append(text_at(at, bottom + 14, abbreviated(name), "end", turned))
    parts.append(upright_at(12, (down[0] + bottom) / 2, y_label))
    parts.append(text_at((left + across[-1] + wide) / 2, bottom + 78, x_label, "middle"))
    return svg((700, bottom + 88), alt, *parts)


def timeline(
    jobs: Sequence[Sequence[tuple[float, float]]], steps: np.ndarray, *, end: float, x_label: str, alt: str
) -> str:
    """Who worked when, as SVG.

    Args:
        jobs: one entry per shown client: its (start, finish) pairs in the units of the x axis.
        steps: [s] times of server steps, drawn as thin lines.
        end: where the x axis ends; it starts at the first job.
    """
    width, high = 700, float(np.clip(len(jobs) * 14, 60, 380))
    first = min((pairs[0][0] for pairs in jobs if pairs), default=0.0)
    x = Scale(first, end if end > first else first + 1, 28, width - 12)
    y = Scale(len(jobs) - 0.4, -0.6, high + 14, 14)
    bars = []
    for parity, colour in enumerate(("c1", "c5")):  # neighbours in time must be told apart
        path = "".join(
            f"M{x(start):.1f} {y(row):.1f}H{min(x(finish), x.end):.1f}"
            for row, pairs in enumerate(jobs)
            for start, finish in pairs[parity::2]
        )
        bars.append(f'<path d="{path}" stroke="var(--{colour})" stroke-width="{0.68 * abs(y(1) - y(0)):.1f}"/>')
    upright = "".join(f"M{x(at):.1f} {y.start:g}V{y.end:g}" for at in steps)
    return svg(
        (width, high + 56),
        alt,
        f'<path d="{upright}" stroke="var(--rule)" stroke-width="0.8"/>',
        *bars,
        left_axis(x, y, np.zeros(0), tick_text, label="client"),
        bottom_axis(x, y, x.ticks(8), tick_text, x_label),
    )


def thin(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> np.ndarray:
    """Indices of at most about `most` points that look like all of them: ends, and extremes of equal stretches."""
    if len(x) <= most:
        return np.arange(len(x))
    keep = {0, len(x) - 1}
    filled = np.where(np.isfinite(y), y, np.nan)
    for part in np.array_split(np.arange(len(x)), most // 2):
        if np.isfinite(filled[part]).any():
            keep |= {int(part[np.nanargmin(filled[part])]), int(part[np.nanargmax(filled[part])])}
        else:
            keep.add(int(part[0]))  # the gap must stay a gap
    return np.array(sorted(keep))


def _panel(
    left: float, right: float, low: float, high: float, *, log_x: bool = False, log: bool = False
) -> tuple[Scale, Scale]:
    """The axes of a panel that span these values."""
    width, height = PANEL
    return Scale(left, right, 48, width - 14, log_x), Scale(low, high, height - 40, 10, log)


def _curve(curve: Curve, x: Scale, y: Scale) -> str:
    """Band, line and last point."""
    seen = np.isfinite(curve.y) & (curve.y > 0 if y.log else True) & (curve.x > 0 if x.log else True)
    values, places = np.where(seen, curve.y, np.nan), np.where(seen, curve.x, np.nan)
    keep = thin(places, values)
    across, out = x(places[keep]), ""
    if curve.low is not None and curve.high is not None:
        low, high = (np.clip(v[keep], y.low, y.high) for v in (curve.low, curve.high))  # below a log axis is no place
        for part in stretches(across + low + high):
            there_and_back = np.append(across[part], across[part][::-1]), np.append(y(low[part]), y(high[part])[::-1])
            out += f'<path d="{path_through(*there_and_back)}Z" fill="var(--{curve.colour})" fill-opacity="0.16"/>'
    path = "".join(path_through(across[part], y(values[keep[part]])) for part in stretches(values[keep]))
    if not path:
        return out
    dashes = ("", ' stroke-dasharray="7 3.5"', ' stroke-dasharray="1.8 3"')[curve.dash]
    out += f'<path d="{path}" fill="none" stroke="var(--{curve.colour})" stroke-width="1.8" stroke-linejoin="round"'
    last = np.flatnonzero(seen)[-1]
    end = f'cx="{x(curve.x[last]):.1f}" cy="{y(values[last]):.1f}" r="2.5" fill="var(--{curve.colour})"'
    return f"{out}{dashes}/><circle {end}/>"


def _cells(counts: np.ndarray, x: Scale, y: Scale) -> str:
    """One hue, more or less opaque, in few shades with a path each: the empty end is the page itself."""
    shades = np.ceil(NUM_SHADES * np.sqrt(counts.T / max(counts.max(), 1))).astype(int)
    paths = ""
    for shade in range(1, NUM_SHADES + 1):
        path = "".join(f"M{column} {row}h1" for row, column in np.argwhere(shades == shade).tolist())
        paths += f'<path d="{path}" stroke-opacity="{0.12 + 0.88 * shade / NUM_SHADES:.3g}"/>' if path else ""
    wide, high = x(1) - x(0), y(1) - y(0)
    place = f'transform="translate({x.start:g} {y(0):.3f}) scale({wide:.4f} {high:.4f})"'
    return f'<g {place} stroke="var(--c1)" stroke-width="1" shape-rendering="crispEdges">{paths}</g>'
