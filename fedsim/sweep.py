"""A grid of runs: every combination of the values given for some keys, each run in a folder of its own.

Lists are the axes (`seed=[0,1,2] local.optimizer.lr=[0.05,0.1]`), other overrides hold for all. A key whose value is
itself a list takes a list of lists (`task.model.hidden=[[100],[200,200]]`). Runs that have finished are not run again
and those that were stopped are resumed, so the same call after Ctrl-C completes the grid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedsim import runs
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.files import write_whole
from fedsim.loop import Diverged

POINT_FILE = "sweep.json"


@dataclass(frozen=True)
class Point:
    """One run of a grid.

    Args:
        name: of its folder.
        overrides: {dotted key: value} of its own and of the whole grid.
    """

    name: str
    overrides: dict[str, Any]


def grid(overrides: Mapping[str, Any]) -> list[Point]:
    """Every combination of the lists among the overrides; the last key varies fastest.

    Raises:
        ConfigError: if there is no list, or one is empty.

    >>> [p.name for p in grid({"seed": [0, 1], "local.optimizer.lr": [0.1, 1e-3], "rounds": 5})]
    ['seed=0,lr=0.1', 'seed=0,lr=0.001', 'seed=1,lr=0.1', 'seed=1,lr=0.001']
    """
    axes = {key: list(value) for key, value in overrides.items() if isinstance(value, list | tuple)}
    fixed = {key: value for key, value in overrides.items() if key not in axes}
    empty = [key for key, values in axes.items() if not values]
    if empty or not axes:
        raise ConfigError(f"sweep: {f'{empty[0]} has no values' if empty else 'no axis'}; give key=[a,b] for some keys")
    short = _short(list(axes))
    points = []
    for values in product(*axes.values()):
        own = dict(zip(axes, values, strict=True))
        name = ",".join(f"{short[key]}={_text(value)}" for key, value in own.items())
        points.append(Point(name, {**fixed, **own}))
    if len({p.name for p in points}) < len(points):
        raise ConfigError("sweep: two runs of the grid are the same; give every value once")
    return points


def sweep(config: Path, overrides: Mapping[str, Any], folder: Path) -> Iterator[tuple[Path, str]]:
    """Run a grid, one run after the other.

    Args:
        config: the experiment file.
        overrides: the grid, as `grid` takes it.
        folder: where the runs' folders go.

    Yields:
        (a run's folder, how it ended: "done", "done before" or why it diverged).

    Raises:
        ConfigError: for a mistake in the file, before anything runs; or if a folder holds a run of another grid.
    """
    points = grid(overrides)
    loaded = [runs.load(config, point.overrides) for point in points]
    for (raw, source), point in zip(loaded, points, strict=True):
        here = {**(raw.get("runtime") or {}), "executor": "in_process", "address": None}
        compose({**raw, "runtime": here}, source).close()
        _claim(folder / point.name, raw)
    for (raw, source), point in zip(loaded, points, strict=True):
        out = folder / point.name
        if (out / "summary.json").exists():
            yield out, "done before"
            continue
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / POINT_FILE, json.dumps(raw, sort_keys=True))
        try:
            runs.execute(raw, source, out, resume=runs.holds_run(out))
            yield out, "done"
        except Diverged as e:
            yield out, str(e)


def _claim(folder: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a folder of another grid."""
    file = folder / POINT_FILE
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(raw)):
        raise ConfigError(f"{folder} holds a run of another sweep; give another --out")


def _short(keys: list[str]) -> dict[str, str]:
    """The last part of each dotted key, or as many parts as tell them apart."""
    depth = 1
    while len({_tail(key, depth) for key in keys}) < len(keys):
        depth += 1
    return {key: _tail(key, depth) for key in keys}


def _tail(key: str, depth: int) -> str:
    return ".".join(key.split(".")[-depth:])


def _text(value: Any) -> str:
    """A value as part of a folder's name."""
    named = value.get("name", value) if isinstance(value, Mapping) else value
    return re.sub(r"[^\w.+-]+", "-", str(named)).strip("-")
