"""The page of a sweep: settings with their seeds folded, the target along each axis, and the curves of the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedsim.history import History, heading, show
from fedsim.report.compare import MEASURES
from fedsim.report.curves import over_each_axis, wants_log
from fedsim.report.draw import Curve, line_panel, look
from fedsim.report.page import Key, Page, Picture, Section, Table, shortened
from fedsim.sweep.pairs import maps
from fedsim.sweep.results import Results, Row, is_number

REPORT_FILE = "report.html"
MAX_CURVES = 6  # of one method's settings; a colour each
MAX_ROWS = 500


def write_page(results: Results) -> Path:
    """Write the page into the sweep's folder, whole or not at all."""
    num_runs = sum(len(row.folders) for row in results.rows)
    count = len(results.troubled)
    trouble = f"{count} run{'s' * (count > 1)} did not come to {'their' if count > 1 else 'its'} end; see below."
    page = Page(
        title=results.folder.resolve().name,
        kind="fedsim sweep",
        facts=[f"{len(results.rows)} settings, {num_runs} runs. Bands: mean ± standard deviation over seeds."],
        notices=[trouble] if count else [],
        sections=[
            _best(results),
            _pairs(results),
            *_axes(results),
            *_curves(results),
            _all(results),
            _trouble(results),
        ],
    )
    return page.write(results.folder / REPORT_FILE)


def value_text(row: Row, target: str | None) -> str:
    """The target of a setting as people read it."""
    if row.value is None or target is None:
        return "–"
    return show(target, row.value) + (f" ± {show(target, row.deviation)}" if row.deviation is not None else "")


def _best(results: Results) -> Section | None:
    best = [*results.best.values()]
    if not best or results.target is None:
        return None
    word = "lowest" if results.minimise else "highest"
    text = f"Of each method the setting with the {word} mean of {results.target} in the last round, over the seeds."
    return Section(title="Best settings", text=text, table=_table(results, best))


def _all(results: Results) -> Section:
    shown, more = results.rows[:MAX_ROWS], len(results.rows) - MAX_ROWS
    text = f"{more:,} more are in sweep.csv." if more > 0 else ""
    table = _table(results, shown, fold=f"{len(shown):,} settings")
    return Section(title="All settings", text=text, table=table)


def _trouble(results: Results) -> Section | None:
    rows = [[r.trial.folder.name, r.ended.status, shortened(r.ended.why, 300)] for r in results.troubled]
    table = Table(header=("run", "ended", "why"), rows=rows, style="prose")
    return Section(title="What did not come to its end", table=table) if rows else None


def _pairs(results: Results) -> Section | None:
    if results.target is None:
        return None
    word = "highest" if results.minimise else "lowest"
    text = (
        f"In a cell the mean of {results.target} over the seeds, and the {word} of them; of several settings with "
        "both values the best one. At the ends the worst of a column and of a row, if all its runs ended."
    )
    pictures = maps(results.rows, results.listed, results.target, results.minimise)
    return Section(title=f"{heading(results.target)} of two keys", text=text, pictures=pictures)


def _axes(results: Results) -> list[Section]:
    """For each axis of numbers: the best that each method reached at each of its values."""
    if results.target is None:
        return []
    methods = list(dict.fromkeys(row.setting.method for row in results.rows))
    pictures = []
    for key in results.keys:
        curves = [_along(results.rows, key, method, i) for i, method in enumerate(methods)]
        found = [curve for curve in curves if curve is not None]
        if not found:
            continue
        log_x = wants_log([curve.x for curve in found])
        percent = "accuracy" in results.target
        svg = line_panel(found, x_label=key, alt=f"{results.target} against {key}", percent=percent, log_x=log_x)
        pictures.append(Picture(title=key, svg=svg))
    keys = [Key(text=name, band=True, **look(i)) for i, name in enumerate(methods) if name]
    text = "At each value the best that any setting of the method reached with it."
    return [Section(title=f"{heading(results.target)} along the axes", text=text, keys=keys, pictures=pictures)]


def _along(rows: Sequence[Row], key: str, method: str, index: int) -> Curve | None:
    best: dict[float, tuple[float, float]] = {}
    for row in rows:  # the best come first
        value = row.setting.values.get(key)
        if row.setting.method == method and row.value is not None and is_number(value):
            best.setdefault(float(value), (row.value, row.deviation or 0.0))
    if len(best) < 2:
        return None
    at = sorted(best)
    y, deviation = np.array([best[x] for x in at]).T
    return Curve(x=np.array(at), y=y, low=y - deviation, high=y + deviation, **look(index))


def _curves(results: Results) -> list[Section]:
    """The best settings' curves over rounds, time and bits: one of each method, or several of the only one."""
    best = [*results.best.values()]
    if len({row.setting.method for row in results.rows}) == 1:
        best = [row for row in results.rows if row.folders][:MAX_CURVES]
    lines = [(row, [History.load(folder) for folder in row.folders]) for row in best]
    keys = [Key(text=row.name, band=len(runs) > 1, **look(i)) for i, (row, runs) in enumerate(lines)]
    sections = []
    for key in dict.fromkeys([*([results.target] if results.target else []), *MEASURES]):
        pictures = over_each_axis([(runs, key) for _, runs in lines], log=key == "distance")
        sections.append(Section(title=heading(key), keys=keys, pictures=pictures))
    return sections


def _table(results: Results, shown: Sequence[Row], fold: str = "") -> Table:
    rows = []
    for row in shown:
        name = row.name + (" (best)" if fold and results.is_best(row) else "")
        values = [shortened(str(row.setting.values.get(key, "")), 80) for key in results.keys]
        rows.append([name, *values, value_text(row, results.target), str(len(row.folders))])
    header = ["", *results.keys, (results.target or "result").replace("_", " "), "seeds"]
    return Table(header=header, rows=rows, fold=fold)
