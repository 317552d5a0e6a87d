"""`report.html` of one run: what it reached, over rounds, virtual time and bits, for whom, and how to get it again.

The page is made from the run's folder alone: metrics.jsonl, and as far as they are there config.yaml, env.json,
clients.jsonl, devices.jsonl, split.npz, topology.npz, pictures.npz and timeline.jsonl. What is missing is left out.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.history import History, heading, show
from fedsim.metrics import small_is_good
from fedsim.report.clients import spread_section
from fedsim.report.curves import over_each_axis
from fedsim.report.devices import devices_section
from fedsim.report.draw import Curve, line_panel, look
from fedsim.report.files import reading
from fedsim.report.page import Key, Page, Picture, Section, Table, Tile, shortened
from fedsim.report.pictures import pictures_section
from fedsim.report.split import split_section
from fedsim.report.timing import absence_section, timing_section
from fedsim.report.topology import topology_section

_TABLE_KEYS = (
    "round",
    "virtual_seconds",
    "bits_up",
    "train_loss",
    "test_loss",
    "test_accuracy",
    "personal_accuracy",
    "client_accuracy_worst_decile",
    "distance",
)
REPORTED = ("train.", "evaluate.", "query.")  # what clients of a Flower app report, by kind of message


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run's folder.

    Returns:
        Its path.

    Raises:
        ValueError: if the folder holds no metrics, or a file that is there cannot be read.
    """
    folder = Path(run_dir)
    history = History.load(folder)
    spread = "How far the honest clients are from one another: they agree as this goes to zero."
    sections = [
        *(Section(title=heading(key), pictures=over_each_axis([([history], key)])) for key in history.test_metrics()),
        *(
            Section(title=key, text="As clients reported it.", pictures=over_each_axis([([history], key)]))
            for key in history.keys()
            if key.startswith(REPORTED)
        ),
        _loss(history),
        _distance(history),
        pictures_section(folder),
        spread_section(history, folder),
        split_section(folder),
        topology_section(folder),
        timing_section(history, folder),
        absence_section(history),
        devices_section(folder),
        Section(
            title="Spread of the honest clients",
            text=spread,
            pictures=over_each_axis([([history], "honest_spread")], log=True),
        ),
        _numbers(history),
        *_configuration(history, folder),
        _environment(history, folder),
    ]
    page = Page(
        title=history.name,
        kind=_command(history),
        facts=facts(history.config),
        notices=_notices(history),
        tiles=_tiles(history),
        sections=sections,
    )
    return page.write(folder / "report.html")


def facts(config: Mapping[str, Any]) -> list[str]:
    """What the run is, in a few words of its configuration: strategy, selection, data, model, split, clients, seed."""
    data = _dig(config, "task.dataset") or _dig(config, "task.name") or _dig(config, "task")
    count = _dig(config, "clients.count")
    alpha = _dig(config, "partition.alpha")
    partition, selection = _name(_dig(config, "partition")), _name(_dig(config, "strategy.selection"))
    found = [
        _name(_dig(config, "strategy")),
        f"selection {selection}" if selection not in ("", "uniform") else "",
        _name(data),
        _name(_dig(config, "task.model")),
        f"{partition} {alpha:g}" if partition and isinstance(alpha, int | float) else partition,
        f"{count:,} clients" if isinstance(count, int) else "",
        f"seed {config['seed']}" if "seed" in config else "",
    ]
    return [shortened(text, 80) for text in found if text]


def _tiles(history: History) -> list[Tile]:
    tiles = []
    for key, label, value in history.headlines():
        remark = ""
        rounds, values = history.series(key)
        if (key.startswith("test_") or key == "distance") and np.isfinite(values).any():
            best = np.nanargmin(values) if small_is_good(key) else np.nanargmax(values)
            text = show(key, float(values[best]))
            remark = f"best {text}, round {rounds[best]:,}" if text != value else ""
        tiles.append(Tile(label=label, value=value, remark=remark))
    return tiles


def _notices(history: History) -> list[str]:
    out = []
    for key in ("train_loss", "test_loss", "distance"):
        rounds, values = history.series(key)
        if values.ndim != 1:
            continue
        bad = np.flatnonzero(~np.isfinite(values.astype(float)))
        if len(bad):
            out.append(f"{key} was not finite in round {rounds[bad[0]]:,}: the run diverged there.")
    return out if history.rows else ["The run has written no rows yet."]


def _loss(history: History) -> Section:
    names = {"test_loss": "held-out set", "train_loss": "clients, while training"}
    keys = [key for key in names if len(history.series(key)[0])]
    legend = [Key(text=names[key], **look(i)) for i, key in enumerate(keys)]
    return Section(title="Loss", keys=legend, pictures=over_each_axis([([history], key) for key in keys]))


def _distance(history: History) -> Section:
    pictures = over_each_axis([([history], "distance")], log=True)
    rounds, x = history.series("x")
    if len(rounds) and x.ndim == 2 and pictures:
        curves = [Curve(x=rounds, y=x[:, i], **look(i)) for i in range(x.shape[1])]
        svg = line_panel(curves, x_label="round", alt="coordinates of x against rounds")
        pictures.append(Picture(title="Coordinates of x", svg=svg))
    return Section(title="Distance to the known solution", pictures=pictures)


def _numbers(history: History) -> Section | None:
    """The evaluated rounds as text, at most 60 of them."""
    evaluated = (*history.test_metrics(), "test_loss", "distance")
    rows = [row for row in history.rows if any(key in row for key in evaluated)] or history.rows
    keys = [
        key
        for key in dict.fromkeys([*_TABLE_KEYS, *history.test_metrics()])
        if any(row.get(key) is not None for row in rows)
    ]
    if not rows:
        return None
    chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 60)).astype(int))]
    cells = [[show(key, float(row[key])) if row.get(key) is not None else "–" for key in keys] for row in chosen]
    rounds = f"{len(rows):,} round{'s' * (len(rows) != 1)}"
    fold = f"{len(chosen):,} of {rounds}" if len(chosen) < len(rows) else rounds
    header = [key.replace("_", " ") for key in keys]
    return Section(title="Numbers", table=Table(header=header, rows=cells, fold=fold))


def _command(history: History) -> str:
    return f"fedsim flower run {shlex.quote(str(app))}" if (app := history.config.get("app")) else "fedsim run"


def _configuration(history: History, folder: Path) -> list[Section]:
    """The file, and the command that runs it again."""
    file = folder / "config.yaml"
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    config, out = shlex.quote(f"{history.name}/config.yaml"), shlex.quote(f"{history.name}-again")
    option = "--config " if "app" in history.config else ""
    same = "The same configuration, seeds included, gives the same metrics; wall time aside."
    return [
        Section(title="Configuration", text="As resolved: every default written out.", code=shortened(text)),
        Section(title="Run it again", text=same, code=f"{_command(history)} {option}{config} --out {out}"),
    ]


def _environment(history: History, folder: Path) -> Section | None:
    versions = history.config.get("versions")
    found = dict(versions) if isinstance(versions, Mapping) else {}
    file = folder / "env.json"
    if file.is_file():
        with reading(file):
            found |= json.loads(file.read_text(encoding="utf-8"))
    rows = [[str(key), shortened(str(value), 300)] for key, value in found.items()]
    return Section(title="Versions and machine", table=Table(header=(), rows=rows, style="prose")) if rows else None


def _dig(config: Mapping[str, Any], path: str) -> Any:
    """A nested value, or None where the path ends early."""
    at: Any = config
    for key in path.split("."):
        at = at.get(key) if isinstance(at, Mapping) else None
    return at


def _name(value: Any) -> str:
    """The name of a table entry, given as text or as a mapping with a `name`."""
    if isinstance(value, Mapping):
        value = value.get("name")
    return "" if value is None else str(value)
