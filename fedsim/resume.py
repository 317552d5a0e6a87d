"""What is saved of a run between two rounds, and from where a resume goes on."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim import checkpoint
from fedsim.best import Best, best_of
from fedsim.config import ConfigError
from fedsim.experiment import Experiment
from fedsim.files import sync
from fedsim.overrides import read_file
from fedsim.sinks import METRICS_FILE, restored, rows_in_order

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands.

    Args:
        round: how many are done.
        seconds: of the clock that they took.
        state: the strategy's.
        fleet: what `DrivenFleet.state` gave.
        best: where `checkpoint.best` was best so far.
        rows: those of its metrics.jsonl, which holds them.
    """

    round: int
    seconds: float
    state: Any
    fleet: Mapping[str, Any]
    best: Best | None
    rows: Rows = ()


def save(folder: Path, e: Experiment, standing: Standing) -> None:
    """Save a checkpoint in a folder, beside which the rows so far lie.

    Raises:
        ConfigError: if it can't be written.
    """
    rows = folder.parent / METRICS_FILE
    written = b""
    if rows.exists():
        sync(rows)  # first, or after a power cut the checkpoint might know of rounds that the file does not
        written = rows.read_bytes()
    parts = {
        "round": standing.round,
        "rows": hashlib.sha256(written).hexdigest(),
        "wall_seconds": standing.seconds,
        "strategy": standing.state,
        "fleet": standing.fleet,
        "config": checkpoint.fingerprint(e.config),
        "best": standing.best,
    }
    checkpoint.save(folder, standing.round, parts, e.checkpoint.keep)


def newest(folder: Path, e: Experiment, fresh: Any) -> Standing | None:
    """The newest sound checkpoint whose rows are all there; None if none was ever made.

    Args:
        folder: of checkpoints.
        e: what is to go on.
        fresh: the state with which its strategy begins.

    Raises:
        ConfigError: if it belongs to another run than this one, or none of those that there are is sound.
    """
    file = folder.parent / METRICS_FILE
    rows = [restored(row) for row in rows_in_order(file)]
    lines = file.read_bytes().splitlines(keepends=True) if rows else []
    paths, found, trouble = checkpoint.checkpoints(folder), None, list[str]()
    if not paths and (began := folder.parent / "config.yaml").exists():
        checkpoint.check_same(began, e.config, checkpoint.fingerprint(read_file(began)))
    for path in reversed(paths):
        try:
            found = _standing(checkpoint.load(path), e, fresh, rows, lines)
            break
        except checkpoint.Damaged as damage:
            trouble.append(str(damage))
    if trouble:
        what = f"{folder}: {'; '.join(trouble)}"
        if found is None:
            raise ConfigError(f"{what}; there is no other to go on from, start anew in another folder")
        warnings.warn(f"{what}; going on from round {found.round} instead", stacklevel=2)
    return found


def _standing(found: checkpoint.Saved, e: Experiment, fresh: Any, rows: Rows, lines: Sequence[bytes]) -> Standing:
    """What a checkpoint says, of the rows that there are and the lines of their file.

    Raises:
        Damaged: if it can't be gone on from, but another may.
        ConfigError: if it belongs to another run than this one.
    """
    path, layout = found.path, e.task.layout
    checkpoint.check_same(path, e.config, found.take("config"))
    state = found.take("strategy", checkpoint.classes_of(fresh), e.device)
    fleet = found.take("fleet", e.fleet.state_classes, e.device)
    round, seconds = found.take("round"), found.take("wall_seconds")
    best = found.take("best", {"Best": Best}, e.device)
    wrong = checkpoint.misfit(state, fresh, (layout.size, layout.num_trainable))
    if wrong is None and round > len(rows):
        wrong = f"{METRICS_FILE} lacks row {len(rows) + 1} or holds it twice"
    if wrong is None and hashlib.sha256(b"".join(lines[:round])).hexdigest() != found.take("rows"):
        wrong = f"{METRICS_FILE} is not what was written up to round {round}"
    if wrong:
        raise checkpoint.Damaged(f"{path.name}: {wrong}")
    if round > e.rounds:
        raise ConfigError(
            f"rounds: {path.parents[1]} already has {round}, more than {e.rounds}; give at least as many to go on, "
            "or start anew in another folder"
        )
    metric = e.checkpoint.best
    if best is None or best.metric != metric:
        best = None if metric is None else _best(metric, rows[:round], state.x)
    return Standing(round=round, seconds=seconds, state=state, fleet=fleet, best=best, rows=rows[:round])


def _best(metric: str, rows: Rows, x: Tensor) -> Best | None:
    """Where a metric that the resume alone names was best; of these rows only the last has its model, x."""
    best = None
    for row in rows:
        best = best_of(best, metric, row, x if row is rows[-1] else None)
    return best
