"""How the result differs over clients: mean, deviation and worst decile by round, and each client's own at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.history import History, show
from fedsim.report.draw import Curve, histogram, line_panel
from fedsim.report.files import read_columns
from fedsim.report.page import Key, Picture, Section


def spread_section(history: History, folder: Path) -> Section:
    """The section, empty if the run evaluated no client."""
    pictures = [p for p in (_by_round(history, "accuracy"), _by_round(history, "loss")) if p is not None]
    keys = [
        Key(text="mean ± standard deviation over clients", colour="c1", band=True),
        Key(text="mean of the worst tenth", colour="c2"),
    ]
    text, final = _final(folder)
    return Section(title="Spread over clients", text=text, keys=keys if pictures else (), pictures=pictures + final)


def _by_round(history: History, what: str) -> Picture | None:
    rounds, mean = history.series(f"client_{what}_mean")
    if not len(rounds) or not np.isfinite(mean.astype(float)).any():
        return None
    curves = [Curve(x=rounds, y=mean.astype(float))]
    deviations = history.series(f"client_{what}_std")
    if np.array_equal(deviations[0], rounds):
        std, most = deviations[1].astype(float), 1 if what == "accuracy" else np.inf
        curves = [Curve(x=rounds, y=mean, low=np.maximum(mean - std, 0), high=np.minimum(mean + std, most))]
    worst_rounds, worst = history.series(f"client_{what}_worst_decile")
    if len(worst_rounds):
        curves.append(Curve(x=worst_rounds, y=worst.astype(float), colour="c2"))
    alt = f"clients' {what} against rounds: mean, standard deviation and worst tenth"
    svg = line_panel(curves, x_label="round", alt=alt, percent=what == "accuracy")
    return Picture(title=f"Clients' {what} by round", svg=svg)


def _final(folder: Path) -> tuple[str, list[Picture]]:
    """A sentence and a picture from the per-client file, if there is one."""
    columns = read_columns(folder, "clients", ["accuracy", "num_examples"])
    accuracy = columns.get("accuracy", np.zeros(0))
    accuracy = accuracy[np.isfinite(accuracy)]
    if not len(accuracy):
        return "", []
    low, middle, high = (
        show("accuracy", float(q)).replace(" ", "\u00a0") for q in np.quantile(accuracy, [0.1, 0.5, 0.9])
    )
    text = (
        f"At the end, over {len(accuracy):,} clients: median {middle}; "
        f"one in ten at most {low}, one in ten at least {high}."
    )
    alt = "number of clients by final accuracy"
    svg = histogram(accuracy, x_label="client's accuracy", alt=alt, percent=True)
    return text, [Picture(title="Clients by final accuracy", svg=svg)]
