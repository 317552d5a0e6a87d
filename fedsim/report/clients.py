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
    measured = [key.removeprefix("test_") for key in history.test_metrics()] or ["accuracy"]
    found = [_by_round(history, "client", what) for what in (*measured, "loss")]
    found += [_by_round(history, whose, what) for whose in ("personal", "global") for what in measured]
    pictures = [p for p in found if p is not None]
    keys = [
        Key(text="mean ± standard deviation over clients", colour="c1", band=True),
        Key(text="mean of the worst tenth", colour="c2"),
    ]
    text, final = _final(folder)
    return Section(title="Spread over clients", text=text, keys=keys if pictures else (), pictures=pictures + final)


TITLES = {
    "client": "Clients' {} by round",
    "personal": "Clients' own models by round: {} on what they hold out",
    "global": "The server's model by round: {} on what clients hold out",
}


def _by_round(history: History, whose: str, what: str) -> Picture | None:
    """Mean, deviation and worst tenth over clients; of what is held out the mean is over samples."""
    rounds, mean = history.series(f"client_{what}_mean" if whose == "client" else f"{whose}_{what}")
    if not len(rounds) or not np.isfinite(mean.astype(float)).any():
        return None
    curves = [Curve(x=rounds, y=mean.astype(float))]
    deviations = history.series(f"{whose}_{what}_std")
    if np.array_equal(deviations[0], rounds):
        std, most = deviations[1].astype(float), 1 if "accuracy" in what else np.inf
        least = -np.inf if (mean < 0).any() else 0
        curves = [Curve(x=rounds, y=mean, low=np.maximum(mean - std, least), high=np.minimum(mean + std, most))]
    worst_rounds, worst = history.series(f"{whose}_{what}_worst_decile")
    if len(worst_rounds):
        curves.append(Curve(x=worst_rounds, y=worst.astype(float), colour="c2"))
    title = TITLES[whose].format(what.replace("_", " "))
    alt = f"{title}: mean, standard deviation and worst tenth"
    svg = line_panel(curves, x_label="round", alt=alt, percent="accuracy" in what)
    return Picture(title=title, svg=svg)


def _final(folder: Path) -> tuple[str, list[Picture]]:
    """A sentence and a picture from the per-client file, if there is one."""
    columns = read_columns(folder, "clients", ["accuracy", "personal_accuracy"])
    texts, pictures = [], []
    for name, intro, title in (
        ("accuracy", "At the end", "Clients by final accuracy"),
        ("personal_accuracy", "With their own models, on what they hold out", "Clients by their own model's accuracy"),
    ):
        accuracy = columns.get(name, np.zeros(0))
        accuracy = accuracy[np.isfinite(accuracy)]
        if not len(accuracy):
            continue
        low, middle, high = (
            show("accuracy", float(q)).replace(" ", "\u00a0") for q in np.quantile(accuracy, [0.1, 0.5, 0.9])
        )
        texts.append(
            f"{intro}, over {len(accuracy):,} clients: median {middle}; "
            f"one in ten at most {low}, one in ten at least {high}."
        )
        alt = f"number of {title.lower()}"
        svg = histogram(accuracy, x_label="client's accuracy", alt=alt, percent=True)
        pictures.append(Picture(title=title, svg=svg))
    return " ".join(texts), pictures
