"""Several runs side by side: one table and overlaid curves; runs that differ only in their seeds count as one.

Who is better depends on the axis: the table gives rounds, virtual seconds and bits to the best value that *every*
run reached (the highest common accuracy), which is the fair place to compare costs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.history import History, show
from fedsim.report.curves import AXES, over_each_axis
from fedsim.report.draw import look
from fedsim.report.page import Key, Page, Section, Table, shortened
from fedsim.sinks import flat

# The first of these that every run has is compared; True where higher is better.
MEASURES = {
    "test_accuracy": True,
    "personal_accuracy": True,
    "distance": False,
    "test_loss": False,
    "train_loss": False,
}
_IRRELEVANT = ("versions", "log", "checkpoint", "runtime", "out")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration with different seeds."""

    runs: tuple[History, ...]

    @cached_property
    def settings(self) -> dict[str, str]:
        """What makes the configuration: {dotted key: text}, without seeds and what cannot change a metric."""
        return _settings(self.runs[0].config)


def comparison_table(dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """One row per configuration of the runs in some folders.

    Returns:
        Dicts of `name`, `num_runs`, `seeds`, `differs` ({key: value} that sets it apart), `measure` (the key
        compared), `final`, `final_std`, `best`, `best_std`, `target`, `rounds_to_target`,
        `virtual_seconds_to_target`, `bits_up_to_target`. Numbers are means over the seeds, the deviations sample
        standard deviations; None where there is no number (one run; a key that a run lacks; never finite).

    Raises:
        ValueError: if no folder is given, one holds no metrics, or the runs have no measure in common.
    """
    groups, measure = _load(dirs)
    return _table(groups, measure)


def write_comparison(dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the comparison as one HTML file `out`, or as `comparison.html` into a folder; errors as above."""
    groups, measure = _load(dirs)
    rows = _table(groups, measure)
    path = Path(out)
    if path.is_dir() or not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        path = path / "comparison.html"
    num_runs = sum(len(g.runs) for g in groups)
    keys = [Key(text=row["name"], band=row["num_runs"] > 1, **look(i)) for i, row in enumerate(rows)]
    sections = [_table_section(rows, measure)]
    for key in dict.fromkeys([measure, *MEASURES]):
        pictures = over_each_axis([(group.runs, key) for group in groups], log=key == "distance")
        sections.append(Section(title=_title(key), keys=keys, pictures=pictures))
    seeds = " Bands: mean ± standard deviation over seeds." if num_runs > len(groups) else ""
    page = Page(
        title=f"{len(groups)} configurations" if len(groups) > 1 else rows[0]["name"],
        kind="fedsim comparison",
        facts=[f"{num_runs} run{'s' * (num_runs != 1)}.{seeds}"],
        sections=sections,
    )
    return page.write(path)


def _load(dirs: Sequence[str | Path]) -> tuple[list[Group], str]:
    if not dirs:
        raise ValueError("nothing to compare; give the folders of one or more runs")
    folders = list(dict.fromkeys(Path(d).resolve() for d in dirs))
    groups: dict[str, list[History]] = {}
    for folder in folders:
        run = History.load(folder)
        # A run without a configuration is nobody's sibling.
        same = json.dumps(_settings(run.config), sort_keys=True) if run.config else str(folder)
        groups.setdefault(same, []).append(run)
    runs = [run for members in groups.values() for run in members]
    for measure in MEASURES:
        if all(len(run.series(measure)[0]) for run in runs):
            return [Group(tuple(members)) for members in groups.values()], measure
    lacking = ", ".join(run.name for run in runs if not any(len(run.series(m)[0]) for m in MEASURES)) or "these runs"
    raise ValueError(f"no measure ({', '.join(MEASURES)}) is common to all runs; look at {lacking}")


def _table(groups: Sequence[Group], measure: str) -> list[dict[str, Any]]:
    higher = MEASURES[measure]
    bests = [b for g in groups for b in (_best(run, measure) for run in g.runs) if b is not None]
    target = (min(bests) if higher else max(bests)) if bests else None
    rows = []
    for group, name in zip(groups, _names(groups), strict=True):
        final, final_std = _mean([_finite(float(run.last(measure))) for run in group.runs])
        best, best_std = _mean([_best(run, measure) for run in group.runs])
        row: dict[str, Any] = {
            "name": name,
            "num_runs": len(group.runs),
            "seeds": [run.config.get("seed") for run in group.runs],
            "differs": _differs(group, groups),
            "measure": measure,
            "final": final,
            "final_std": final_std,
            "best": best,
            "best_std": best_std,
            "target": target,
        }
        for axis in AXES:
            costs = [_cost(run, measure, axis, target) for run in group.runs]
            row[f"{'rounds' if axis == 'round' else axis}_to_target"] = _mean(costs)[0] if None not in costs else None
        rows.append(row)
    return rows


def _best(run: History, measure: str) -> float | None:
    values = run.series(measure)[1].astype(float)
    values = values[np.isfinite(values)]
    return None if not len(values) else float(values.max() if MEASURES[measure] else values.min())


def _cost(run: History, measure: str, axis: str, target: float | None) -> float | None:
    """The axis' value where the run first reached the target."""
    x, y = run.pairs(axis, measure)
    if target is None or not len(x) or (axis != "round" and not x.any()):
        return None
    reached = np.flatnonzero(y >= target if MEASURES[measure] else y <= target)
    return float(x[reached[0]]) if len(reached) else None


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """(mean, sample standard deviation) of what is there."""
    known = np.array([v for v in values if v is not None])
    if not len(known):
        return None, None
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _table_section(rows: Sequence[Mapping[str, Any]], measure: str) -> Section:
    def text(key: str, value: float | None, deviation: float | None = None) -> str:
        if value is None:
            return "–"
        return show(key, value) + (f" ± {show(key, deviation)}" if deviation is not None else "")

    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("", lambda r: r["name"]),
        ("seeds", lambda r: str(r["num_runs"])),
        (f"final {_title(measure).lower()}", lambda r: text(measure, r["final"], r["final_std"])),
        ("best", lambda r: text(measure, r["best"], r["best_std"])),
        ("rounds to target", lambda r: text("round", r["rounds_to_target"])),
        ("time to target", lambda r: text("virtual_seconds", r["virtual_seconds_to_target"])),
        ("bits to target", lambda r: text("bits_up", r["bits_up_to_target"])),
        ("sets it apart", lambda r: shortened("  ".join(f"{k}={v}" for k, v in r["differs"].items()), 160)),
    ]
    cells = [[read(row) for _, read in columns] for row in rows]
    # A column in which nobody has anything to say is left out.
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] not in ("–", "") for row in cells)]
    target = rows[0]["target"]
    note = ""
    if target is not None:
        note = f"Target: {show(measure, target)}, the best {_title(measure).lower()} that every run reached."
    table = Table(
        header=[columns[i][0] for i in kept],
        rows=[[row[i] for i in kept] for row in cells],
        style="left" if kept[-1] == len(columns) - 1 else "",
    )
    return Section(title="Result", text=note, table=table)


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize()


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
