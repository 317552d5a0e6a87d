"""Where the rows of a run go: JSON lines always, and TensorBoard, W&B, MLflow or trackio when asked.

A row is one server step: {"round": 3, "test_accuracy": 0.71, ...}. `metrics.jsonl` is the record that everything
else (resume, History, the report) reads; the others are mirrors for their own viewers. A resumed run computes
the rows after its checkpoint again, to the same bits, so each sink forgets them (or may safely see them twice).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, TextIO

from fedsim.config import did_you_mean
from fedsim.files import write_whole

METRICS_FILE = "metrics.jsonl"
PROJECT = "fedsim"  # what the viewers file runs under


class Sink(Protocol):
    """Takes the rows of one run, in order."""

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """Make ready.

        Args:
            run_dir: the run's folder, which exists.
            config: the resolved configuration, nested.
            resume_at: the checkpoint's round, after which rows will be written again; None for a new run.
        """
        ...

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row; it has a `round`. Numbers may be Python's, NumPy's or scalar tensors."""
        ...

    def close(self) -> None:
        """Bring everything to rest; calling it twice, or before `open`, is harmless."""
        ...


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, flushed as it is written, so that a crash costs half a line at most."""

    _file: TextIO | None = None

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. On resume the rows beyond the checkpoint are cut off, atomically.

        Raises:
            ValueError: if the folder holds rows and this is no resume, or lacks a row up to the checkpoint.
        """
        path = run_dir / METRICS_FILE
        if resume_at is not None:
            kept = rows_in_order(path)[:resume_at]
            if len(kept) < resume_at:
                raise ValueError(f"{path} lacks row {len(kept) + 1}; restore the file or start anew")
            write_whole(path, "".join(encode_row(row) + "\n" for row in kept))
        elif path.exists() and path.stat().st_size:
            raise ValueError(f"{path} already holds a run; resume it (--resume) or write to another folder (--out)")
        self._file = path.open("a", encoding="utf-8", newline="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        assert self._file is not None, "write before open"
        self._file.write(encode_row(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())


class TensorBoard:
    """TensorBoard event files in `tensorboard/`; steps are rounds."""

    _writer: Any = None

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. On resume TensorBoard is told to hide what it has beyond the checkpoint."""
        module = _need("torch.utils.tensorboard", "tensorboard", "pip install tensorboard")
        purge = None if resume_at is None else resume_at + 1
        self._writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge)
        if resume_at is None:
            text = json.dumps(config, indent=2, default=str).replace("\n", "\n    ")
            self._writer.add_text("config", "    " + text)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, global_step=int(row["round"]))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Logging:
    """What the packages share whose runs have `log` and `finish`."""

    _run: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(scalars(row), step=int(row["round"]))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class WandB(_Logging):
    """Weights & Biases; offline, in the run's folder, unless WANDB_MODE says online (extra: wandb)."""

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. W&B drops rows of steps it has seen; a resumed run repeats them to the same bits."""
        self._run = _need("wandb", "wandb").init(
            project=PROJECT,
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=dict(config),
            mode=os.environ.get("WANDB_MODE") or "offline",  # sent later by `wandb sync`
            id=_known_as(run_dir / "wandb_run_id", resume_at),
            resume="allow",
        )


class Trackio(_Logging):
    """trackio: runs in a local database, shown by `trackio show` (extra: trackio)."""

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. Runs go by name; on resume the rows are added to the run of that name."""
        trackio = _need("trackio", "trackio")
        resume = "never" if resume_at is None else "allow"
        name = _known_as(run_dir / "trackio_run_name", resume_at, f"{run_dir.resolve().name}-")
        self._run = trackio.init(project=PROJECT, name=name, config=dict(config), resume=resume, embed=False)


class MLflow:
    """MLflow: parameters and metrics of a run, sent to where MLFLOW_TRACKING_URI says (extra: mlflow)."""

    _client: Any = None
    _run_id = ""

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. A resumed run writes on into the same MLflow run; repeated steps have equal values."""
        self._client = client = _need("mlflow", "mlflow").MlflowClient()
        file = run_dir / "mlflow_run_id"
        if known := _remembered(file, resume_at):
            self._run_id = known
            return
        found = client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else client.create_experiment(PROJECT)
        self._run_id = client.create_run(experiment, run_name=run_dir.resolve().name).info.run_id
        write_whole(file, self._run_id)
        for key, value in flat(config):
            client.log_param(self._run_id, key, str(value)[:500])  # MLflow's oldest limit on a value

    def write(self, row: Mapping[str, Any]) -> None:
        entities = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        step = int(row["round"])
        batch = [entities.Metric(name, value, now, step) for name, value in scalars(row).items()]
        self._client.log_batch(self._run_id, metrics=batch)

    def close(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id)
            self._client = None


SINKS: dict[str, type[Sink]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


EXTRAS = ("wandb", "mlflow", "trackio")
"""Sinks whose package is an extra of the same name."""


def make_sinks(names: list[str]) -> list[Sink]:
    """Sinks by name, with their defaults; JSON lines are always among them, first.

    Raises:
        ValueError: for a name that is not in `SINKS`, or whose package is not installed: better here than when the
            run has a folder.
    """
    for name in names:
        if name not in SINKS:
            raise ValueError(f"unknown sink {name!r}{did_you_mean(name, SINKS)}")
        if name in EXTRAS and not _installed(name):
            raise ValueError(_missing(name))
    return [SINKS[name]() for name in dict.fromkeys(["jsonl", *names])]


def encode_row(row: Mapping[str, Any]) -> str:
    """One line of JSON. NaN and infinity become null, and their keys are listed under "nonfinite".

    >>> encode_row({"round": 1, "train_loss": float("nan")})
    '{"round": 1, "train_loss": null, "nonfinite": ["train_loss"]}'
    """
    plain = {key: _plain(value) for key, value in row.items() if key != "nonfinite"}
    bad = [key for key, value in plain.items() if not _finite(value)]
    out: dict[str, Any] = {key: _nulled(value) for key, value in plain.items()}
    listed = [*dict.fromkeys([*row.get("nonfinite", []), *bad])]
    return json.dumps(out | ({"nonfinite": listed} if listed else {}), allow_nan=False)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, nulls left as they are. A last line cut short by a crash is left out.

    Raises:
        ValueError: if any other line is not a JSON object with a `round`.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = [_row(line) for line in lines]
    if rows[-1] is None:  # what follows the last newline: nothing, or a line cut short
        del rows[-1]
    if None in rows:
        line = rows.index(None) + 1
        raise ValueError(f"{path}, line {line} is not a row of metrics; restore the file or start anew")
    return [row for row in rows if row is not None]


def rows_in_order(path: Path) -> list[dict[str, Any]]:
    """Rows 1, 2, ... of a metrics.jsonl up to the first that is missing, doubled or damaged; no file has no rows."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        row = _row(line)
        if row is None or row["round"] != len(rows) + 1:
            break
        rows.append(row)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    """A row, or None for what is none."""
    try:
        row = json.loads(line)
        row["round"] <= 0  # noqa: B015 (a row that cannot be placed is as bad as one that cannot be read)
    except (ValueError, TypeError, KeyError):
        return None
    return dict(row)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, without `round`: what the viewers can show."""
    plain = {key: _plain(value) for key, value in row.items() if key != "round"}
    numbers = {k: v for k, v in plain.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: float(v) for k, v in numbers.items() if isfinite(v)}


def _plain(value: Any) -> Any:
    """NumPy's and torch's values as Python's own, by the method that both have."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(_finite(v) for v in value)
    return not isinstance(value, float) or isfinite(value)


def _nulled(value: Any) -> Any:
    if isinstance(value, list):
        return [_nulled(v) for v in value]
    return value if _finite(value) else None


def _need(module: str, extra: str, install: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise ValueError(f"log.sinks: {_missing(extra, install)} ({e})") from e


def _missing(extra: str, install: str | None = None) -> str:
    way_out = install or f"pip install 'fedsim-stacks[{extra}]'"
    return f"'{extra}' is not installed; run {way_out}, or leave it out"


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _remembered(file: Path, resume_at: int | None) -> str | None:
    """The name under which a viewer knows this run, if it is resumed and has one."""
    return file.read_text(encoding="utf-8") if resume_at is not None and file.exists() else None


def _known_as(file: Path, resume_at: int | None, prefix: str = "") -> str:
    """That name, or a new one, which the file then remembers."""
    if known := _remembered(file, resume_at):
        return known
    name = prefix + uuid.uuid4().hex[:8]
    write_whole(file, name)
    return name


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(keys joined by dots, value) of nested mappings."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
