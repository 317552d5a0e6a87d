"""When things happened: staleness of what the server used, and a timeline of who worked when."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.history import History
from fedsim.report.draw import Curve, line_panel, look, timeline
from fedsim.report.files import read_columns
from fedsim.report.page import Key, Picture, Section

SHOWN_CLIENTS = 24
SHOWN_JOBS = 240
SHOWN_STEPS = 80


def timing_section(history: History, folder: Path) -> Section | None:
    """The section, or None if the run has no staleness."""
    rounds, mean = history.series("staleness_mean")
    if not len(rounds):
        return None
    svg = line_panel([Curve(x=rounds, y=mean.astype(float))], x_label="round", alt="staleness against rounds")
    drawn = _timeline(history, folder)
    pictures = [drawn[1]] if drawn else []
    return Section(
        title="Asynchrony",
        text="Staleness: how many server steps a reply missed while its client worked." + (drawn[0] if drawn else ""),
        keys=[Key(text="mean of a step's replies", colour="c1")],
        pictures=[*pictures, Picture(title="Staleness by round", svg=svg)],
    )


def absence_section(history: History) -> Section | None:
    """Who was away, dropped out, was late, failed or was refused in each round; None where nobody could be."""
    counts = {
        "num_clients": "replied",
        "num_away": "off line",
        "num_dropped": "dropped out",
        "num_late": "late",
        "num_failed": "failed",
        "num_refused": "refused",
    }
    found = {key: history.series(key) for key in counts}
    if not any(len(found[key][0]) for key in counts if key != "num_clients"):
        return None
    shown = [key for key in counts if len(found[key][0])]
    curves = {key: Curve(x=found[key][0], y=found[key][1].astype(float), **look(i)) for i, key in enumerate(shown)}
    away = curves.pop("num_away", None)  # often many times as many as take part
    drawn = [("Jobs by round", [*curves.values()])] + ([("Clients off line by round", [away])] if away else [])
    totals = [f"{found[key][1].sum():,.0f} {counts[key]}" for key in shown if key != "num_away"]
    few = len(history.series("too_few")[0])
    return Section(
        title="Absence",
        text=f"Jobs of all rounds: {', '.join(totals)}."
        + (" Off line is a mean over a round's looks." if away else "")
        + (f" Rounds of too few replies, which changed nothing: {few:,}." if few else ""),
        keys=[Key(text=counts[key], **look(i)) for i, key in enumerate(shown)],
        pictures=[
            Picture(title=title, svg=line_panel(lines, x_label="round", alt=title.lower(), counts=True))
            for title, lines in drawn
        ],
    )


def _timeline(history: History, folder: Path) -> tuple[str, Picture] | None:
    """A sentence and a picture of the first jobs of some clients."""
    columns = read_columns(folder, "timeline", ["client", "start", "finish"])
    if len(columns) < 3:
        return None
    table = np.stack([columns["client"], columns["start"], columns["finish"]])
    table = table[:, np.isfinite(table).all(0) & (table[2] >= table[1])]
    known = np.unique(table[0])
    if not len(known):
        return None
    shown = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), SHOWN_CLIENTS)).astype(int))]
    table = table[:, np.isin(table[0], shown)]
    table = table[:, np.argsort(table[1], kind="stable")]
    # Up to where the next job would be one too many, so that no row ends before the others do.
    end = float(table[1, SHOWN_JOBS]) if table.shape[1] > SHOWN_JOBS else float(table[2].max())
    client, start, finish = table[:, :SHOWN_JOBS]
    jobs = [list(zip(start[client == c].tolist(), finish[client == c].tolist(), strict=True)) for c in shown]
    at = history.series("virtual_seconds")[1].astype(float)
    at = at[(at >= start[0]) & (at <= end)]
    at = at if len(at) <= SHOWN_STEPS else np.zeros(0)
    text = f" The timeline shows the first {len(start):,} jobs of {len(shown):,} of {len(known):,} clients"
    text += "; its upright lines are server steps." if len(at) else "."
    svg = timeline(jobs, at, end=end, x_label="virtual time (s)", alt="timeline: when each shown client worked")
    return text, Picture(title="Who worked when", svg=svg, wide=True)
