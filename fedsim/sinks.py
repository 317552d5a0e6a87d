"""Where the rows of a run go: JSON lines always, and TensorBoard, W&B, MLflow, trackio or the user's own when asked.

A row is one server step: {"round": 3, "test_accuracy": 0.71, ...}. `metrics.jsonl` is the record that everything
else (resume, History, the report) reads; the others are mirrors for their own viewers. A resumed run computes
the rows after its checkpoint again, to the same bits, so each sink forgets them (or may safely see them twice).
"""

from __future__ import annotations

import importlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO, runtime_checkable

from fedsim.files import write_whole

METRICS_FILE = "metrics.jsonl"
PROJECT = "fedsim"  # what the viewers file runs under


@runtime_checkable
class Sink(Protocol):
    """Takes the rows of one run, in order."""

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """Make ready.

        Args:
            run_dir: the run's folder, which exists.
            config: the resolved configuration, nested.
            resume_at: the checkpoint's round, after which rows will be written again; None for a new run.
        """

    def write(self, row: Mapping[str, Any]) -> None:
        """Take one row; it has a `round`. Numbers may be Python's, NumPy's or scalar tensors."""

    def close(self) -> None:
        """Bring everything to rest; calling it twice, or before `open`, is harmless."""


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
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_at is None else resume_at + 1
        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge)
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


@dataclass(kw_only=True)
class WandB(_Logging):
    """Weights & Biases; offline, in the run's folder, unless told otherwise (extra: wandb).

    Args:
        project: that the run belongs to.
        entity: whose project; the user's own if left out.
        group: of runs that belong together, such as the seeds of one setting.
        name: of the run; its folder's if left out.
        tags: to find it by.
        mode: offline (sent later by `wandb sync`), online or disabled; if left out what WANDB_MODE says, else offline.
    """

    project: str = PROJECT
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    mode: str | None = None

    def __post_init__(self) -> None:
        _package("wandb")

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. W&B drops rows of steps it has seen; a resumed run repeats them to the same bits."""
        self._run = _package("wandb").init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or run_dir.resolve().name,
            tags=list(self.tags),
            dir=str(run_dir),
            config=dict(config),
            mode=self.mode or os.environ.get("WANDB_MODE") or "offline",
            id=_known_as(run_dir / "wandb_run_id", resume_at, lambda: uuid.uuid4().hex[:8]),
            resume="allow",
        )


@dataclass(kw_only=True)
class Trackio(_Logging):
    """trackio: runs in a local database, shown by `trackio show` (extra: trackio).

    Args:
        project: that the run belongs to.
    """

    project: str = PROJECT

    def __post_init__(self) -> None:
        _package("trackio")

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. Runs go by name; on resume the rows are added to the run of that name."""
        resume = "never" if resume_at is None else "allow"
        new = f"{run_dir.resolve().name}-{uuid.uuid4().hex[:8]}"
        name = _known_as(run_dir / "trackio_run_name", resume_at, lambda: new)
        self._run = _package("trackio").init(
            project=self.project, name=name, config=dict(config), resume=resume, embed=False
        )


@dataclass(kw_only=True)
class MLflow:
    """MLflow: parameters and metrics of a run, sent to where MLFLOW_TRACKING_URI says (extra: mlflow).

    Args:
        experiment: that the run belongs to, by name; made if there is none.
        name: of the run; its folder's if left out.
        tags: of the run.
    """

    experiment: str = PROJECT
    name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    _client: Any = field(default=None, init=False, repr=False)
    _run_id: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        _package("mlflow")

    def open(self, run_dir: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        """See `Sink.open`. A resumed run writes on into the same MLflow run; repeated steps have equal values."""
        self._client = client = _package("mlflow").MlflowClient()

        def begin() -> str:
            found = client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else client.create_experiment(self.experiment)
            named = self.name or run_dir.resolve().name
            run_id = str(client.create_run(experiment, tags=dict(self.tags), run_name=named).info.run_id)
            for key, value in flat(config):
                client.log_param(run_id, key, str(value)[:500])  # MLflow's oldest limit on a value
            return run_id

        self._run_id = _known_as(run_dir / "mlflow_run_id", resume_at, begin)

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


def as_sink(made: object, name: str) -> Sink:
    """What an entry of `log.sinks` gave, if it is a sink.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(made, Sink):
        raise ValueError(f"{name} gave a {type(made).__name__}, not a sink; it needs methods open, write and close")
    return made


def json_lines_first(sinks: Sequence[Sink]) -> list[Sink]:
    """The sinks of a run: JSON lines are always among them, first."""
    return [JsonLines(), *(sink for sink in sinks if not isinstance(sink, JsonLines))]


def encode_row(row: Mapping[str, Any]) -> str:
    """One line of JSON. NaN and infinity become null, and their keys are listed under "nonfinite".

    >>> encode_row({"round": 1, "train_loss": float("nan")})
    '{"round": 1, "train_loss": null, "nonfinite": ["train_loss"]}'
    """
    text = json.dumps({k: v for k, v in row.items() if k != "nonfinite"}, default=lambda v: v.tolist())
    plain = json.loads(text, parse_constant=lambda constant: None)  # constants: NaN, Infinity, -Infinity
    lost = [k for k, v in json.loads(text).items() if v != plain[k]]
    listed = list(dict.fromkeys([*row.get("nonfinite", []), *lost]))
    return json.dumps(plain | ({"nonfinite": listed} if listed else {}))


def restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as it was before it was written: NaN where a null stands for what was not finite.

    >>> restored({"round": 1, "train_loss": None, "nonfinite": ["train_loss"]})
    {'round': 1, 'train_loss': nan}
    """
    out = {key: value for key, value in row.items() if key != "nonfinite"}
    for key in row.get("nonfinite", ()):
        value = row.get(key)
        out[key] = [float("nan") if v is None else v for v in value] if isinstance(value, list) else float("nan")
    return out


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
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return dict(row)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, without `round`: what the viewers can show."""
    plain = json.loads(encode_row({k: v for k, v in row.items() if k != "round"}))
    return {k: float(v) for k, v in plain.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _package(name: str) -> ModuleType:
    """A viewer's package, which is an extra of the same name."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        way_out = f"run pip install 'fedsim-stacks[{name}]', or leave it out"
        raise ValueError(f"'{name}' is not installed; {way_out} ({e})") from e


def _known_as(file: Path, resume_at: int | None, new: Callable[[], str]) -> str:
    """The name under which a viewer knows this run: the one it had if it is resumed, else a new one to remember."""
    if resume_at is not None and file.exists():
        return file.read_text(encoding="utf-8")
    name = new()
    write_whole(file, name)
    return name


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(keys joined by dots, value) of nested mappings."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
