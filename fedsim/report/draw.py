"""Drawing for the report: matplotlib in, SVG out, with colours that follow the page.

Everything is drawn in stand-in colours that are then replaced by CSS variables, so that one picture is readable on
a light and on a dark page, and text is left as text in the page's own font. No pyplot, and the caller's rcParams
are put back. One unit of a picture is one CSS pixel at its natural size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (340, 220)
NUM_COLOURS = 6
MAX_POINTS = 600

# Colours no picture would hold by chance, and the CSS variable that each stands for.
_STAND_INS = {"ink": "#010203", "muted": "#010204", "rule": "#010205", "grid": "#010206", "page": "#010207"}
_STAND_INS |= {f"c{i + 1}": f"#0102{i + 16:02x}" for i in range(NUM_COLOURS)}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsim",
    "text.parse_math": False,  # a class called "$x" is a name, not a formula
    "font.size": 11,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.edgecolor": _STAND_INS["rule"],
    "axes.labelcolor": _STAND_INS["muted"],
    "axes.labelpad": 6,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": _STAND_INS["ink"],
    "grid.color": _STAND_INS["grid"],
    "xtick.color": _STAND_INS["rule"],
    "ytick.color": _STAND_INS["rule"],
    "xtick.labelcolor": _STAND_INS["muted"],
    "ytick.labelcolor": _STAND_INS["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel, with a band around it where `low` and `high` are given.

    Args:
        x, y, low, high: [n]; not finite values leave a gap.
        colour: a name of this module's palette, `c1` to `c6`, `muted` or `ink`.
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
    with _figure(*PANEL) as figure:
        ax = _panel(figure, x_label)
        for curve in reversed(curves):
            _draw(ax, curve, log)
        if log_x:
            ax.set_xscale("log")
            _log_axis(ax.xaxis)
        else:
            ax.set_xlim(left=0)
        if log:
            ax.set_yscale("log")
            _log_axis(ax.yaxis)
        else:
            _linear_axis(ax, percent)
        if counts:
            ax.set_ylim(bottom=0)
        return _svg(figure, alt)


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
    with _figure(*PANEL) as figure:
        ax = _panel(figure, x_label)
        ax.stairs(np.histogram(values, edges)[0], edges, fill=True, color=_STAND_INS["c1"], alpha=0.75)
        ax.axvline(float(np.median(values)), color=_STAND_INS["ink"], linewidth=1, dashes=(3, 2))
        _linear_axis(ax, percent=False)
        ax.set_ylim(bottom=0)
        if percent:
            ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        return _svg(figure, alt)


def heat_map(counts: np.ndarray, *, rows: Sequence[str] | None, x_label: str, y_label: str, alt: str, ids: bool) -> str:
    """A client-by-class picture, with a bar of each client's size above it, as SVG.

    Args:
        counts: [n clients, k classes], both at least 1 and small enough to see. The shade grows with the square root.
        rows: k names, or None for numbers.
        ids: the columns are clients 0 to n - 1, so number them.
    """
    n, k = counts.shape
    width, rows_high = 700, float(np.clip(k * 32, 120, 380))
    left = 60 if rows is None else float(np.clip(24 + 6.5 * max(map(len, rows)), 60, 140))
    height = rows_high + 118
    with _figure(width, height) as figure:
        sizes = figure.add_axes((left / width, (rows_high + 58) / height, (width - left - 12) / width, 50 / height))
        ax = figure.add_axes((left / width, 46 / height, (width - left - 12) / width, rows_high / height))
        sizes.stairs(counts.sum(1), np.arange(n + 1) - 0.5, fill=True, color=_STAND_INS["muted"], alpha=0.55)
        sizes.set_xlim(-0.5, n - 0.5)
        sizes.set_xticks([])
        sizes.spines["left"].set_visible(False)
        _ticks(sizes.yaxis, 2)
        # One hue, more or less opaque: the empty end is the page itself, light or dark.
        shade = np.zeros((k, n, 4))
        shade[..., :3] = np.array([0x26, 0x86, 0xD9]) / 255
        shade[..., 3] = np.where(counts.T > 0, 0.12 + 0.88 * np.sqrt(counts.T / max(counts.max(), 1)), 0)
        ax.imshow(shade, aspect="auto", interpolation="none", extent=(-0.5, n - 0.5, k - 0.5, -0.5))
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label if rows is None else "")
        if rows is not None:
            ax.set_yticks(range(k), [name if len(name) <= 18 else name[:17] + "…" for name in rows])
        else:
            _ticks(ax.yaxis, 10, whole=True)
        if ids:
            _ticks(ax.xaxis, 10, whole=True)
        else:
            ax.set_xticks([])
        return _svg(figure, alt)


def network(places: np.ndarray, pairs: np.ndarray, *, alt: str) -> str:
    """Points and the lines between them, as SVG.

    Args:
        places: [n, 2] within -1 and 1.
        pairs: [2, E] which points are linked.
    """
    with _figure(PANEL[0], PANEL[0]) as figure:
        ax = figure.add_axes((0.03, 0.03, 0.94, 0.94))
        (x, y), gap = places[pairs].transpose(2, 0, 1), np.full(pairs.shape[1], np.nan)
        ax.plot(*(np.stack([*ends, gap]).T.ravel() for ends in (x, y)), color=_STAND_INS["muted"], linewidth=0.7)
        ax.plot(*places.T, "o", color=_STAND_INS["c1"], markersize=float(np.clip(150 / len(places), 3, 8)))
        ax.set_axis_off()
        return _svg(figure, alt)


def timeline(
    jobs: Sequence[Sequence[tuple[float, float]]], steps: np.ndarray, *, end: float, x_label: str, alt: str
) -> str:
    """Who worked when, as SVG.

    Args:
        jobs: one entry per shown client: its (start, finish) pairs in the units of the x axis.
        steps: [s] times of server steps, drawn as thin lines.
        end: where the x axis ends; it starts at the first job.
    """
    width, rows_high = 700, float(np.clip(len(jobs) * 14, 60, 380))
    height = rows_high + 56
    with _figure(width, height) as figure:
        ax = figure.add_axes((28 / width, 42 / height, (width - 40) / width, rows_high / height))
        for at in steps:
            ax.axvline(at, color=_STAND_INS["rule"], linewidth=0.8, zorder=0.5)
        for row, pairs in enumerate(jobs):
            colours = [_STAND_INS["c1"], _STAND_INS["c5"]]  # neighbours in time must be told apart
            bars = [(start, finish - start) for start, finish in pairs]
            ax.broken_barh(bars, (row - 0.34, 0.68), facecolors=[colours[i % 2] for i in range(len(bars))])
        ax.set_xlim(min((pairs[0][0] for pairs in jobs if pairs), default=0.0), end)
        ax.set_ylim(len(jobs) - 0.4, -0.6)
        ax.set_yticks([])
        ax.set_ylabel("client")
        ax.set_xlabel(x_label)
        ax.spines["left"].set_visible(False)
        _ticks(ax.xaxis, 8)
        return _svg(figure, alt)


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


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of its own, in this module's style; what the caller had set is put back afterwards."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(_STYLE, after_reset=True):
        yield Figure(figsize=(width / 72, height / 72))


def _panel(figure: Figure, x_label: str) -> Axes:
    width, height = PANEL
    ax = figure.add_axes((48 / width, 40 / height, (width - 62) / width, (height - 50) / height))
    ax.set_xlabel(x_label)
    ax.grid(axis="y")
    ax.spines["left"].set_visible(False)
    _ticks(ax.xaxis, 6, whole=x_label == "round")
    return ax


def _draw(ax: Axes, curve: Curve, log: bool) -> None:
    y = np.where(curve.y > 0, curve.y, np.nan) if log else np.where(np.isfinite(curve.y), curve.y, np.nan)
    keep = thin(curve.x, y)
    colour = _STAND_INS[curve.colour]
    if curve.low is not None and curve.high is not None:
        # On a log axis a band below zero has no place; it ends at the smallest value shown.
        low = np.maximum(curve.low, np.nanmin(y)) if log and np.isfinite(y).any() else curve.low
        ax.fill_between(curve.x[keep], low[keep], curve.high[keep], color=colour, alpha=0.16, linewidth=0)
    style: Any = ("-", (0, (4, 2)), (0, (1, 1.6)))[curve.dash]
    ax.plot(curve.x[keep], y[keep], color=colour, linestyle=style)
    last = np.flatnonzero(np.isfinite(y))[-1:]
    ax.plot(curve.x[last], y[last], "o", color=colour, markersize=4.5, clip_on=False)


def _linear_axis(ax: Axes, percent: bool) -> None:
    _ticks(ax.yaxis, 5)
    if not percent:
        return
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, 0.0), min(high, 1.0))
    ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %")


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_view_interval()
    if np.log10(high / low) < 1.3:  # so short an axis may hold no power of ten
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(lambda v, _: tick_text(v, log=True))


def _ticks(axis: Any, most: int, whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=whole, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda v, _: tick_text(v))


def tick_text(value: float, log: bool = False) -> str:
    """A short number for an axis.

    >>> tick_text(12000), tick_text(0.25), tick_text(2.5e6), tick_text(1e-6, log=True), tick_text(-0.5)
    ('12,000', '0.25', '2.5M', '10⁻⁶', '−0.5')
    """
    if value < 0:
        return "−" + tick_text(-value, log)
    if log and value and not 1e-3 < value < 1e4:
        power = int(np.floor(np.log10(value) + 1e-9))
        lead = round(value / 10.0**power)
        text = "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return text if lead == 1 else f"{lead}·{text}"
    for scale, letter in ((1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.4g}{letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an inline <svg>: themed, without ids that nothing refers to, named for screen readers."""
    from html import escape

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\bid="([^"]+)"', lambda m: m.group() if m.group(1) in used else "", text)
    # Ids are hashes of what they name; a prefix per picture, the same in every process, keeps those of two apart.
    stamp = f"f{crc32(text.encode()):x}"
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{stamp}-", text)
    for name, hexed in _STAND_INS.items():
        text = text.replace(hexed, f"var(--{name})")
    width, height = (72 * float(v) for v in figure.get_size_inches())
    head = f'<svg class="picture" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(alt)}"'
    head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"^<svg[^>]*>", lambda _: head, text, count=1)
