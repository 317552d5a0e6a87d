"""Scales and shapes of the report's pictures: text of SVG, in the page's variables for colours.

One unit is one CSS pixel at a picture's natural size; y grows downward.
"""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

Text = Callable[[float], str]


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


def log_text(value: float) -> str:
    return tick_text(value, log=True)


def percent_text(value: float) -> str:
    return f"{100 * value:.3g} %"


def abbreviated(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


@dataclass(frozen=True)
class Scale:
    """From values to pixels along one axis: `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values: Any) -> Any:
        low, high = self.low, self.high
        if self.log:
            low, high, values = np.log10(low), np.log10(high), np.log10(values)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int, whole: bool = False) -> np.ndarray:
        """At most about `most` round values from end to end: powers of ten, or 1, 2, 5 times such, or evenly spaced."""
        low, high = sorted((self.low, self.high))
        if self.log:
            powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
            for leads in ([1], [1, 2, 5]):
                found = np.outer(powers, leads).ravel()
                found = found[(found >= low) & (found <= high)]
                if len(found) > 1:
                    return found[:: -(-len(found) // (most + 1))]
        least = (high - low) / most
        power = 10.0 ** np.floor(np.log10(least))
        steps = power * np.array([1, 2, 2.5, 5, 10, 20])
        fit = (steps >= least * (1 - 1e-9)) & (not whole or (steps >= 1) & (steps % 1 == 0))
        step = steps[fit][0] if fit.any() else 1.0  # an axis of whole numbers that is shorter than `most`
        return step * np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) + 0.0  # no -0


def limits(series: Sequence[np.ndarray], log: bool) -> tuple[float, float]:
    """The least and the greatest finite value, and a twentieth of what is between them beyond."""
    values = np.concatenate([np.asarray(v, float) for v in series])
    values = values[np.isfinite(values) & (not log or values > 0)]
    if log:
        values = np.log10(values)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.05 * (high - low) or (0.5 if log else 0.05 * abs(high)) or 1.0
    return (10 ** (low - room), 10 ** (high + room)) if log else (low - room, high + room)


def stretches(y: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of each run of finite values."""
    finite = np.flatnonzero(np.isfinite(y))
    return (part for part in np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1) if len(part))


def path_through(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def bar_shape(heights: np.ndarray, edges: np.ndarray, y: Scale, colour: str, opacity: float) -> str:
    """Bars side by side as one shape; heights [n] as values of y, edges [n + 1] in pixels."""
    steps = "".join(f"V{top:.1f}H{right:.1f}" for top, right in zip(y(heights), edges[1:], strict=True))
    path = f"M{edges[0]:.1f} {y.start:g}{steps}V{y.start:g}Z"
    return f'<path d="{path}" fill="var(--{colour})" fill-opacity="{opacity}"/>'


def left_axis(x: Scale, y: Scale, ticks: np.ndarray, text: Text, *, grid: bool = False, label: str = "") -> str:
    """Values named at the left of an area, perhaps with lines across, and the axis' name."""
    names = "".join(text_at(x.start - 5, y(v) + 4, text(v), "end") for v in ticks)
    lines = "".join(f"M{x.start:g} {y(v):.1f}H{x.end:g}" for v in ticks) if grid else ""
    across = f'<path d="{lines}" stroke="var(--grid)"/>' if grid else ""
    return across + names + upright_at(12, (y.start + y.end) / 2, label)


def bottom_axis(x: Scale, y: Scale, ticks: np.ndarray, text: Text, label: str) -> str:
    """The line under an area, with values named, and the axis' name."""
    marks = "".join(f"M{x(v):.1f} {y.start:g}v3" for v in ticks)
    names = "".join(text_at(x(v), y.start + 15, text(v), "middle") for v in ticks)
    line = f'<path d="M{x.start:g} {y.start:g}H{x.end:g}{marks}" stroke="var(--rule)"/>'
    return line + names + text_at((x.start + x.end) / 2, y.start + 33, label, "middle")


def text_at(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>' if text else ""


def upright_at(x: float, y: float, text: str) -> str:
    """Text that reads from below, around its middle."""
    return text_at(x, y, text, "middle", f' transform="rotate(-90 {x:g} {y:g})"')


def png(pixels: np.ndarray) -> str:
    """An image [height, width, 2 or 4] uint8, grey or coloured with opacity last, as a data address (RFC 2083)."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 4 if channels == 2 else 6, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in np.ascontiguousarray(pixels))  # each line as it is
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")
    return "data:image/png;base64," + b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def svg(size: tuple[float, float], alt: str, *parts: str) -> str:
    """The picture, named for screen readers."""
    head = f'<svg class="picture" viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{escape(alt)}"'
    style = 'font-size="11" fill="var(--muted)" stroke-width="1"'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><g {style}>{"".join(parts)}</g></svg>'
