"""Several runs side by side: one table and overlaid curves; runs that differ only in their seeds count as one.

Who is better depends on the axis: the table gives rounds, virtual seconds and bits to the best value that *every*
run reached (the highest common accuracy), which is the fair place to compare costs.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.config import did_you_mean
from fedsim.files import write_whole
from fedsim.history import History, heading, show
from fedsim.metrics import small_is_good
from fedsim.report.curves import AXES, over_each_axis
from fedsim.report.draw import look
from fedsim.report.page import Key, Page, Section, Table, shortened
from fedsim.sinks import flat

# The first of these that every run has is compared.
MEASURES = ("test_accuracy", "personal_accuracy", "distance", "test_loss", "train_loss")
APART = "sets it apart"
_IRRELEVANT = ("versions", "identity", "log", "checkpoint", "runtime", "out")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with different seeds."""

    runs: tuple[History, ...]

    @cached_property
    def settings(self) -> dict[str, str]:
        """What makes the configuration: {dotted key: text}, without seeds and what cannot change a metric."""
        return _settings(self.runs[0].config)


@dataclass(frozen=True)
class Comparison:
    """Configurations side by side.

    Args:
        groups: one for each configuration.
        measure: the metric by which they are compared.
        given: the value of it to count costs to; None for the best that every run reached.
    """

    groups: tuple[Group, ...]
    measure: str
    given: float | None = None

    @cached_property
    def target(self) -> float | None:
        """What costs are counted to; None if no run was ever finite."""
        bests = [b for g in self.groups for b in (_best(run, self.measure) for run in g.runs) if b is not None]
        if self.given is not None or not bests:
            return self.given
        return max(bests) if small_is_good(self.measure) else min(bests)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """One row per configuration.

        Dicts of `name`, `num_runs`, `seeds`, `differs` ({key: value} that sets it apart), `measure` (the key
        compared), `final`, `final_std`, `best`, `best_std`, `target`, `rounds_to_target`,
        `virtual_seconds_to_target`, `bits_up_to_target`. Numbers are means over the seeds, the deviations sample
        standard deviations; None where there is no number (one run; a key that a run lacks; never finite; a target
        that a run never reached).
        """
        return [self._row(group, name) for group, name in zip(self.groups, _names(self.groups), strict=True)]

    def in_words(self) -> str:
        """What rounds, time and bits are counted to; empty if nothing."""
        if self.target is None:
            return ""
        value, what = show(self.measure, self.target), self.measure.replace("_", " ")
        return f"{value} {what}" + (", the best that every run reached" if self.given is None else "")

    def write(self, out: str | Path) -> Path:
        """Write it as one file, .html, .csv or .tex, or as `comparison.html` into a folder.

        Raises:
            ValueError: for another ending.
            OSError: if it cannot be written.
        """
        path = Path(out)
        if path.is_dir() or not path.suffix:
            path.mkdir(parents=True, exist_ok=True)
            path = path / "comparison.html"
        if path.suffix not in WRITERS:
            raise ValueError(f"{path}: a comparison is written as {', '.join(WRITERS)}; give one of these endings")
        write_whole(path, WRITERS[path.suffix](self))
        return path

    def _row(self, group: Group, name: str) -> dict[str, Any]:
        measure = self.measure
        final, final_std = _mean([_finite(float(run.last(measure))) for run in group.runs])
        best, best_std = _mean([_best(run, measure) for run in group.runs])
        row: dict[str, Any] = {
            "name": name,
            "num_runs": len(group.runs),
            "seeds": [run.config.get("seed") for run in group.runs],
            "differs": _differs(group, self.groups),
            "measure": measure,
            "final": final,
            "final_std": final_std,
            "best": best,
            "best_std": best_std,
            "target": self.target,
        }
        for axis in AXES:
            costs = [_cost(run, measure, axis, self.target) for run in group.runs]
            row[f"{'rounds' if axis == 'round' else axis}_to_target"] = _mean(costs)[0] if None not in costs else None
        return row


def compared(dirs: Sequence[str | Path], metric: str | None = None, target: float | None = None) -> Comparison:
    """The runs in some folders side by side. Of runs with the same settings and seeds one counts, with a warning.

    Args:
        dirs: run folders.
        metric: to compare by; the first of `MEASURES` that all runs have if left out.
        target: the value of it to count rounds, seconds and bits to; the best that every run reached if left out.

    Raises:
        ValueError: if no folder is given, one holds no metrics, the runs have no measure in common, or the target is
            no value of it.
    """
    groups = _grouped(dirs)
    runs = [run for group in groups for run in group.runs]
    measure = _measure(runs) if metric is None else metric
    for run in runs:
        if not len(run.series(measure)[0]):
            raise ValueError(f"{run.path}: no row has {measure!r}{did_you_mean(measure, run.keys())}")
        if run.series(measure)[1].ndim > 1:
            raise ValueError(f"{measure!r} is a list in every row; compare by a number")
    if target is not None and "accuracy" in measure and not 0 <= target <= 1:
        raise ValueError(f"the target of {measure} is a share and must lie in [0, 1], got {target:g}")
    return Comparison(tuple(groups), measure, target)


def _grouped(dirs: Sequence[str | Path]) -> list[Group]:
    if not dirs:
        raise ValueError("nothing to compare; give the folders of one or more runs")
    groups: dict[str, dict[str, History]] = {}
    for folder in dict.fromkeys(Path(d).resolve() for d in dirs):
        run = History.load(folder)
        # A run without a configuration is nobody's sibling.
        same = json.dumps(_settings(run.config), sort_keys=True) if run.config else str(folder)
        members, seeds = groups.setdefault(same, {}), json.dumps(_seeds(run.config), sort_keys=True)
        if (twin := members.get(seeds)) is not None:
            first, second = sorted((twin, run), key=len, reverse=True)  # the one that went further is looked at
            warnings.warn(f"{second.path}: same settings and seed as {first.path}, so it does not count", stacklevel=3)
            run = first
        members[seeds] = run
    return [Group(tuple(members.values())) for members in groups.values()]


def _measure(runs: Sequence[History]) -> str:
    """What all of these runs have."""
    for measure in MEASURES:
        if all(len(run.series(measure)[0]) for run in runs):
            return measure
    lacking = ", ".join(run.name for run in runs if not any(len(run.series(m)[0]) for m in MEASURES)) or "these runs"
    raise ValueError(f"no measure ({', '.join(MEASURES)}) is common to all runs; look at {lacking}")


def _best(run: History, measure: str) -> float | None:
    values = run.series(measure)[1].astype(float)
    values = values[np.isfinite(values)]
    return None if not len(values) else float(values.min() if small_is_good(measure) else values.max())


def _cost(run: History, measure: str, axis: str, target: float | None) -> float | None:
    """The axis' value where the run first reached the target."""
    x, y = run.pairs(axis, measure)
    if target is None or not len(x) or (axis != "round" and not x.any()):
        return None
    reached = np.flatnonzero(y <= target if small_is_good(measure) else y >= target)
    return float(x[reached[0]]) if len(reached) else None


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of what is there."""
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return None, None
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table as people read it; a column in which nobody has anything to say is left out."""
    measure = comparison.measure

    def text(key: str, value: float | None, deviation: float | None = None) -> str:
        if value is None:
            return "–"
        return show(key, value) + (f" ± {show(key, deviation)}" if deviation is not None else "")

    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("", lambda r: r["name"]),
        ("seeds", lambda r: str(r["num_runs"])),
        (f"final {heading(measure).lower()}", lambda r: text(measure, r["final"], r["final_std"])),
        ("best", lambda r: text(measure, r["best"], r["best_std"])),
        ("rounds to target", lambda r: text("round", r["rounds_to_target"])),
        ("time to target", lambda r: text("virtual_seconds", r["virtual_seconds_to_target"])),
        ("bits to target", lambda r: text("bits_up", r["bits_up_to_target"])),
        (APART, lambda r: shortened("  ".join(f"{k}={v}" for k, v in r["differs"].items()), 160)),
    ]
    cells = [[read(row) for _, read in columns] for row in comparison.rows]
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] not in ("–", "") for row in cells)]
    return [columns[i][0] for i in kept], [[row[i] for i in kept] for row in cells]


def _html(comparison: Comparison) -> str:
    groups, measure = comparison.groups, comparison.measure
    header, cells = _cells(comparison)
    note = f"Target: {comparison.in_words()}." if comparison.in_words() else ""
    table = Table(header=header, rows=cells, style="left" if header[-1] == APART else "")
    sections = [Section(title="Result", text=note, table=table)]
    keys = [Key(text=row["name"], band=row["num_runs"] > 1, **look(i)) for i, row in enumerate(comparison.rows)]
    for key in dict.fromkeys([measure, *MEASURES]):
        pictures = over_each_axis([(group.runs, key) for group in groups], log=key == "distance")
        sections.append(Section(title=heading(key), keys=keys, pictures=pictures))
    num_runs = sum(len(g.runs) for g in groups)
    seeds = " Bands: mean ± standard deviation over seeds." if num_runs > len(groups) else ""
    return Page(
        title=f"{len(groups)} configurations" if len(groups) > 1 else comparison.rows[0]["name"],
        kind="fedsim comparison",
        facts=[f"{num_runs} run{'s' * (num_runs != 1)}.{seeds}"],
        sections=sections,
    ).html()


def _csv(comparison: Comparison) -> str:
    """Numbers as they are, a column for each key that sets configurations apart, seeds with spaces between."""
    import pandas as pd

    lines = []
    for row in comparison.rows:
        seeds = " ".join(str(seed) for seed in row["seeds"])
        lines.append({k: v for k, v in row.items() if k != "differs"} | {"seeds": seeds} | row["differs"])
    return str(pd.DataFrame(lines).to_csv(index=False))


def _latex(comparison: Comparison) -> str:
    """The table as people read it, as a tabular of the package booktabs."""
    import pandas as pd

    header, cells = _cells(comparison)
    return str(pd.DataFrame(cells, columns=header).to_latex(index=False, escape=True))


WRITERS = {".html": _html, ".csv": _csv, ".tex": _latex}


def _seeds(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(config) if key.rsplit(".", 1)[-1] == "seed"}


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: json.dumps(value, default=str)
        for key, value in flat({k: v for k, v in config.items() if k not in _IRRELEVANT})
        if key.rsplit(".", 1)[-1] != "seed"
    }


def _differs(group: Group, groups: Sequence[Group]) -> dict[str, str]:
    """The settings in which the groups are not all alike, as this one has them; null is as good as not there."""
    others = [g.settings for g in groups]
    return {
        key: value.strip('"')
        for key, value in group.settings.items()
        if any(other.get(key, "null") != value for other in others)
    }


def _names(groups: Sequence[Group]) -> list[str]:
    """A name for each group, all different: the folder's, or what the folders of its seeds begin with."""
    names = [_common_start([run.name for run in g.runs]) for g in groups]
    depth = 1
    while len(set(names)) < len(names) and depth < 6:
        depth += 1
        names = [_common_start(["/".join(Path(str(run.path)).parts[-depth:]) for run in g.runs]) for g in groups]
    return names


def _common_start(names: Sequence[str]) -> str:
    """What names have in common: the parts between commas that all have, as in the folders of a sweep; else the start,
    less a trailing `-seed`; the first name where that is nothing."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(",") for name in names]
    if shared := [part for part in parts[0] if all(part in other for other in parts)]:
        return ",".join(shared)
    start = os.path.commonprefix(names).rstrip("0123456789").rstrip("-_./ ")
    return re.sub("[-_](seed|s)$", "", start) or names[0]
