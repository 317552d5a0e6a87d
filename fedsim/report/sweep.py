"""The page of a sweep: settings with their seeds folded, the target along each axis, and the curves of the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.history import History, show
from fedsim.report.compare import MEASURES
from fedsim.report.curves import over_each_axis, wants_log
from fedsim.report.draw import Curve, line_panel, look
from fedsim.report.page import Key, Page, Picture, Section, Table, shortened
from fedsim.report.pairs import Cell, maps

MAX_CURVES = 6  # of one method's settings; a colour each
MAX_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class SettingLine:
    """One setting of a sweep.

    Args:
        name: of it; method: whose it is, "" where there is one.
        values: {key: value} of the axes.
        folders: of its runs that are done, one a seed.
        value, deviation: of the target over the seeds; None where there is none.
        worst: of the seeds; None unless all have one.
        best: whether it is its method's best.
    """

    name: str
    method: str
    values: Mapping[str, Any]
    folders: Sequence[Path]
    value: float | None
    deviation: float | None
    worst: float | None = None
    best: bool


@dataclass(frozen=True, kw_only=True)
class SweepPage:
    """What the page shows.

    Args:
        title: of it.
        lines: every setting, the best of a method first.
        axes: {key: values} that were listed, in their order.
        troubled: (run, what happened, why) of trials that did not come to their end.
        target: the metric that settings are judged by; None if no trial has one.
        minimise: whether a small one is good.
    """

    title: str
    lines: Sequence[SettingLine]
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    troubled: Sequence[tuple[str, str, str]]
    target: str | None
    minimise: bool

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all."""
        num_runs = sum(len(line.folders) for line in self.lines)
        count = len(self.troubled)
        trouble = f"{count} run{'s' * (count > 1)} did not come to {'their' if count > 1 else 'its'} end; see below."
        page = Page(
            title=self.title,
            kind="fedsim sweep",
            facts=[f"{len(self.lines)} settings, {num_runs} runs. Bands: mean ± standard deviation over seeds."],
            notices=[trouble] if count else [],
            sections=[self._best(), self._pairs(), *self._axes(), *self._curves(), self._all(), self._trouble()],
        )
        return page.write(path)

    def _best(self) -> Section | None:
        best = [line for line in self.lines if line.best]
        if not best or self.target is None:
            return None
        word = "lowest" if self.minimise else "highest"
        text = f"Of each method the setting with the {word} mean of {self.target} in the last round, over the seeds."
        return Section(title="Best settings", text=text, table=_table(best, self.target))

    def _all(self) -> Section:
        shown, more = self.lines[:MAX_ROWS], len(self.lines) - MAX_ROWS
        text = f"{more:,} more are in sweep.csv." if more > 0 else ""
        table = _table(shown, self.target, fold=f"{len(shown):,} settings")
        return Section(title="All settings", text=text, table=table)

    def _trouble(self) -> Section | None:
        rows = [[name, status, shortened(why, 300)] for name, status, why in self.troubled]
        table = Table(header=("run", "ended", "why"), rows=rows, style="prose")
        return Section(title="What did not come to its end", table=table) if rows else None

    def _pairs(self) -> Section | None:
        if self.target is None:
            return None
        cells = [Cell(values=line.values, value=line.value, worst=line.worst) for line in self.lines]
        word = "highest" if self.minimise else "lowest"
        text = (
            f"In a cell the mean of {self.target} over the seeds, and the {word} of them; of several settings with "
            "both values the best one. At the ends the worst of a column and of a row, if all its runs ended."
        )
        pictures = maps(cells, self.axes, self.target, self.minimise)
        return Section(title=f"{_title(self.target)} of two keys", text=text, pictures=pictures)

    def _axes(self) -> list[Section]:
        """For each axis of numbers: the best that each method reached at each of its values."""
        if self.target is None:
            return []
        methods = list(dict.fromkeys(line.method for line in self.lines))
        pictures = []
        for key in dict.fromkeys(key for line in self.lines for key in line.values):
            curves = [self._along(key, method, i) for i, method in enumerate(methods)]
            found = [curve for curve in curves if curve is not None]
            if not found:
                continue
            log_x = wants_log([curve.x for curve in found])
            percent = "accuracy" in self.target
            svg = line_panel(found, x_label=key, alt=f"{self.target} against {key}", percent=percent, log_x=log_x)
            pictures.append(Picture(title=key, svg=svg))
        keys = [Key(text=name, band=True, **look(i)) for i, name in enumerate(methods) if name]
        text = "At each value the best that any setting of the method reached with it."
        return [Section(title=f"{_title(self.target)} along the axes", text=text, keys=keys, pictures=pictures)]

    def _along(self, key: str, method: str, index: int) -> Curve | None:
        best: dict[float, tuple[float, float]] = {}
        for line in self.lines:  # the best come first
            value = line.values.get(key)
            if line.method != method or line.value is None or isinstance(value, bool):
                continue
            if isinstance(value, int | float):
                best.setdefault(float(value), (line.value, line.deviation or 0.0))
        if len(best) < 2:
            return None
        at = sorted(best)
        y, deviation = np.array([best[x] for x in at]).T
        return Curve(x=np.array(at), y=y, low=y - deviation, high=y + deviation, **look(index))

    def _curves(self) -> list[Section]:
        """The best settings' curves over rounds, time and bits: one of each method, or several of the only one."""
        best = [line for line in self.lines if line.best]
        if len({line.method for line in self.lines}) == 1:
            best = [line for line in self.lines if line.folders][:MAX_CURVES]
        lines = [(line, [History.load(folder) for folder in line.folders]) for line in best]
        keys = [Key(text=line.name, band=len(runs) > 1, **look(i)) for i, (line, runs) in enumerate(lines)]
        sections = []
        for key in dict.fromkeys([*([self.target] if self.target else []), *MEASURES]):
            pictures = over_each_axis([(runs, key) for _, runs in lines], log=key == "distance")
            sections.append(Section(title=_title(key), keys=keys, pictures=pictures))
        return sections


def _table(lines: Sequence[SettingLine], target: str | None, fold: str = "") -> Table:
    axes = list(dict.fromkeys(key for line in lines for key in line.values))
    rows = []
    for line in lines:
        value = "–"
        if line.value is not None and target is not None:
            value = show(target, line.value)
            value += f" ± {show(target, line.deviation)}" if line.deviation is not None else ""
        values = [shortened(str(line.values.get(key, "")), 80) for key in axes]
        rows.append([line.name + (" (best)" if line.best and fold else ""), *values, value, str(len(line.folders))])
    return Table(header=["", *axes, (target or "result").replace("_", " "), "seeds"], rows=rows, fold=fold)


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()
