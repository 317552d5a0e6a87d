"""What a sweep found: one line a trial, seeds folded to mean and deviation, and the best setting of every method.

The value of a trial is the target's last one, not its best: the best of many evaluations on held-out data is a
choice made on them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeGuard

from fedsim.config import ConfigError, did_you_mean
from fedsim.files import write_whole
from fedsim.report.compare import MEASURES
from fedsim.results import write_config
from fedsim.sweep.space import Choice, Method, Setting
from fedsim.sweep.trials import Ended, Trial


@dataclass(frozen=True)
class Record:
    """A trial that has ended.

    Args:
        final: {metric: last value} of one that is done.
    """

    trial: Trial
    ended: Ended
    final: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """Its line in the sweep's files."""
        trial, ended = self.trial, self.ended
        seed = trial.raw.get("seed", 0) if trial.seed is None else trial.seed
        return {
            "folder": trial.folder.name,
            "method": trial.setting.method,
            **trial.setting.values,
            "seed": seed,
            "status": ended.status,
            "why": ended.why,
            "seconds": round(ended.seconds, 3),
            **{k: v for k, v in self.final.items() if not isinstance(v, list)},
        }


@dataclass(frozen=True)
class Row:
    """A setting with its seeds folded.

    Args:
        records: its trials that have ended, at most one a seed.
        value: the target's mean over those that are done; None if there is none. deviation: the sample standard
            deviation, None of fewer than two.
        worst: of the seeds; None unless all have a value.
        num: how many have.
        whole: whether all seeds have.
    """

    setting: Setting
    records: tuple[Record, ...]
    value: float | None
    deviation: float | None
    worst: float | None
    num: int
    whole: bool

    @property
    def name(self) -> str:
        """In words."""
        return self.setting.name or "the file's settings"

    @property
    def folders(self) -> list[Path]:
        """Of its runs that are done, one a seed."""
        return [record.trial.folder for record in self.records if record.ended.status == "done"]


@dataclass(frozen=True)
class Results:
    """All of a sweep's results.

    Args:
        folder: where its files are.
        methods: that were searched.
        records: of all trials that ended, in the order in which they were proposed.
        target: the metric that settings are judged by; None if no trial has one.
        minimise: whether a small one is good.
        num_seeds: that each setting is run with.
    """

    folder: Path
    methods: list[Method]
    records: list[Record]
    target: str | None
    minimise: bool
    num_seeds: int

    @cached_property
    def rows(self) -> list[Row]:
        """Every setting, the best of a method first and those last that lack a value."""
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.trial.setting.name, []).append(record)
        names = [method.name for method in self.methods]
        rows = [self._row(records) for records in groups.values()]
        return sorted(rows, key=lambda row: (names.index(row.setting.method), not row.whole, self._rank(row.value)))

    @cached_property
    def best(self) -> dict[str, Row]:
        """{method: its best setting}; only one whose seeds all have a value can be it."""
        found: dict[str, Row] = {}
        for row in self.rows:
            if row.whole:
                found.setdefault(row.setting.method, row)
        return found

    def is_best(self, row: Row) -> bool:
        """Whether it is its method's best."""
        return self.best.get(row.setting.method) is row

    @cached_property
    def keys(self) -> list[str]:
        """Of all axes."""
        return list(dict.fromkeys(key for row in self.rows for key in row.setting.values))

    @property
    def listed(self) -> dict[str, list[Any]]:
        """{key: all its values that were listed, by whatever method, in their order}."""
        found: dict[str, list[Any]] = {}
        for key, axis in (pair for method in self.methods for pair in method.axes.items()):
            values = axis.values if isinstance(axis, Choice) else ()
            found[key] = [*(known := found.get(key, [])), *(v for v in values if v not in known)]
        return found

    @property
    def troubled(self) -> list[Record]:
        """Trials that diverged or failed."""
        return [record for record in self.records if record.ended.status != "done"]

    def at_the_edge(self, row: Row) -> list[str]:
        """Axes of three numbers or more of which a setting has the smallest or the largest."""
        axes = next(method.axes for method in self.methods if method.name == row.setting.method)
        found = []
        for key, axis in axes.items():
            tried = [v for v in axis.values if is_number(v)] if isinstance(axis, Choice) else []
            if len(tried) > 2 and row.setting.values[key] in (min(tried), max(tried)):
                found.append(key)
        return found

    def write(self) -> None:
        """Write `sweep.jsonl` and `sweep.csv`, a line for each trial, and `best-METHOD.yaml`, to be run again."""
        lines = [record.line() for record in self.records]
        write_whole(self.folder / "sweep.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        import pandas as pd

        table = StringIO()
        pd.DataFrame(lines).to_csv(table, index=False)
        write_whole(self.folder / "sweep.csv", table.getvalue())
        for name in (method.name for method in self.methods):
            file = self.folder / (f"best-{name}.yaml" if name else "best.yaml")
            if name in self.best:
                write_config(file, self.best[name].records[0].trial.raw)
            else:
                file.unlink(missing_ok=True)  # of an earlier call with fewer seeds

    def _row(self, records: list[Record]) -> Row:
        values = [value for record in records if (value := value_of(record, self.target)) is not None]
        whole = len(values) == self.num_seeds
        return Row(
            setting=records[0].trial.setting,
            records=tuple(records),
            value=mean(values) if values else None,
            deviation=stdev(values) if len(values) > 1 else None,
            worst=(max if self.minimise else min)(values) if whole else None,
            num=len(values),
            whole=whole,
        )

    def _rank(self, value: float | None) -> float:
        if value is None:
            return float("inf")
        return value if self.minimise else -value


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_of(record: Record, target: str | None) -> float | None:
    """The target's last value in a trial; None where there is none, or none that is finite."""
    value = None if target is None else record.final.get(target)
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def target_of(record: Record, target: str | None) -> str:
    """The metric by which a trial that is done is judged: the one asked for, else the first of those usually compared.

    Raises:
        ConfigError: if the trial has none such.
    """
    metrics = [key for key, value in record.final.items() if not isinstance(value, list)]
    if target is None:
        target = next((key for key in MEASURES if key in metrics), None)
        if target is None:
            raise ConfigError(f"{record.trial.folder} reports none of {', '.join(MEASURES)}; name a metric by --target")
    if target not in metrics:
        hint = did_you_mean(target, metrics)
        raise ConfigError(f"--target {target}: no row of {record.trial.folder} has it{hint}")
    return target


def folded(records: Iterable[Record], target: str) -> float | None:
    """A setting's value for a search: the mean over its seeds, None unless all of them have one."""
    values = [value_of(record, target) for record in records]
    return None if None in values or not values else mean(v for v in values if v is not None)
