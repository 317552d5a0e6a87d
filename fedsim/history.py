"""History: the rows of a run, as `fedsim.run` returns them and as a run folder reads back.

Keys ending in `_seconds` and beginning with `bits_` are running totals; evaluation keys are present only in the
rows of rounds that evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.best import best_row
from fedsim.overrides import plain_errors
from fedsim.sinks import METRICS_FILE, read_rows, restored

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from torch import nn

MODEL_FILE, BEST_FILE = "model.safetensors", "model.best.safetensors"
JUDGED_BY = ("test_accuracy", "distance", "test_loss")
"""What a round is best by, the first that rows have, where `checkpoint.best` names nothing."""
NO_MODULE = "the task of this run has no module"

HEADLINES = (
    ("test_accuracy", "Test accuracy"),
    ("test_loss", "Test loss"),
    ("train_loss", "Training loss"),
    ("personal_accuracy", "Accuracy of clients' own models"),
    ("client_accuracy_mean", "Mean accuracy of clients"),
    ("client_accuracy_worst_decile", "Worst decile of clients"),
    ("distance", "Distance to the solution"),
    ("round", "Rounds"),
    ("virtual_seconds", "Virtual time"),
    ("bits_up", "Sent up"),
    ("bits_down", "Sent down"),
    ("wall_seconds", "Wall time"),
)

_LABELS = {
    "round": "round",
    "virtual_seconds": "virtual time",
    "wall_seconds": "wall time",
    "bits_up": "sent by clients",
    "bits_down": "sent to clients",
}
_BITS = ((1e12, "Tbit"), (1e9, "Gbit"), (1e6, "Mbit"), (1e3, "kbit"), (1.0, "bit"))


@dataclass(frozen=True, repr=False)
class History:
    """The rows of a run.

    Args:
        rows: one mapping per server step, in order; each has a `round`.
        config: the resolved configuration, nested; may be empty.
        path: the run's folder, if it has one.
        models: {"model", "best_model": what makes it}, where that was trained by this process.

    >>> h = History([{"round": 1, "test_loss": 2.0}, {"round": 2}, {"round": 3, "test_loss": 1.5}])
    >>> h.last("test_loss")
    1.5
    >>> h.series("test_loss")
    (array([1, 3]), array([2. , 1.5]))
    """

    rows: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    models: Mapping[str, Callable[[], nn.Module]] = field(default_factory=dict, compare=False)

    @classmethod
    def load(cls, run_dir: str | Path) -> History:
        """Read a run folder: `metrics.jsonl`, and `config.yaml` if there is one.

        Raises:
            ValueError: if the folder holds no metrics, or a line of them or the configuration cannot be read.
        """
        folder = Path(run_dir)
        file = folder / METRICS_FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no {METRICS_FILE}; give the folder of a run (what --out named)")
        return cls([restored(row) for row in read_rows(file)], _config(folder / "config.yaml"), folder)

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> list[str]:
        """Every key that some row has, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def test_metrics(self) -> list[str]:
        """The keys of what was measured on held-out samples, the loss aside."""
        return [key for key in self.keys() if key.startswith("test_") and key != "test_loss"]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(rounds [R], values [R] or [R, ...]) of the R rows that have `key`; both empty if none has."""
        found = [row for row in self.rows if row.get(key) is not None]
        return np.array([row["round"] for row in found], dtype=int), np.array([row[key] for row in found])

    def pairs(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """(values of x, values of y) over the rows that have both."""
        found = [row for row in self.rows if row.get(x) is not None and row.get(y) is not None]
        return np.array([row[x] for row in found], dtype=float), np.array([row[y] for row in found], dtype=float)

    def last(self, key: str) -> Any:
        """The latest value of `key`.

        Raises:
            KeyError: if no row has it; the message lists those that exist.
        """
        for row in reversed(self.rows):
            if row.get(key) is not None:
                return row[key]
        raise KeyError(f"no row has '{key}'; there are {', '.join(self.keys()) or 'no rows'}")

    @property
    def best(self) -> Mapping[str, Any]:
        """The row of the round that was best by `checkpoint.best`, else by the first of `JUDGED_BY` that rows have.

        Raises:
            ValueError: if no round was evaluated by it.
        """
        named = (self.config.get("checkpoint") or {}).get("best")
        for metric in (named,) if named else JUDGED_BY:
            if (row := best_row(self.rows, metric)) is not None:
                return row
        raise ValueError(
            f"no row has {named or ' or '.join(JUDGED_BY)}; there are {', '.join(self.keys()) or 'no rows'}"
        )

    @property
    def model(self) -> nn.Module:
        """The module with the final parameters, in evaluation mode; a new one each time.

        Raises:
            ValueError: if the task has none, or the run's folder can't tell which it was.
        """
        return self._trained("model", MODEL_FILE)

    @property
    def best_model(self) -> nn.Module:
        """The module of the round in which `checkpoint.best` was best; see `model`.

        Raises:
            ValueError: if it was not kept; the others of `model`.
        """
        if not (self.config.get("checkpoint") or {}).get("best"):
            raise ValueError("the best model was not kept; name a metric by checkpoint.best, such as test_accuracy")
        if self.path is not None and self.rows and not (self.path / BEST_FILE).is_file():
            raise ValueError(f"the model of round {self.best['round']} was not kept: checkpoint.best was named later")
        return self._trained("best_model", BEST_FILE)

    def _trained(self, which: str, file: str) -> nn.Module:
        if which in self.models:
            return self.models[which]()
        from fedsim.tasks.models import stored_model

        if self.path is None:
            raise ValueError(NO_MODULE)
        return stored_model(self.path / file, self.config.get("task") or {})

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame of all rows, indexed by round; what a row lacks is NaN."""
        import pandas as pd

        frame = pd.DataFrame(self.rows, columns=self.keys() or ["round"])
        return frame.set_index("round")

    def plot(self, y: str = "test_accuracy", x: str = "round", ax: Axes | None = None) -> Axes:
        """Draw one key against another: `round`, `virtual_seconds`, `bits_up`, or any other.

        Returns:
            The axes drawn on; pass it again as `ax` to lay a second run over the first.

        Raises:
            KeyError: if no row has both keys.
        """
        xs, ys = self.pairs(x, y)
        if not len(xs):
            raise KeyError(f"no row has both '{x}' and '{y}'; there are {', '.join(self.keys()) or 'no rows'}")
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        scale, label = axis_scale(x, float(xs.max()))
        ax.plot(xs / scale, ys, label=self.name)
        ax.set_xlabel(label)
        ax.set_ylabel(y.replace("_", " "))
        return ax

    @property
    def name(self) -> str:
        """The folder's name, else the strategy's, else `run`."""
        strategy = self.config.get("strategy")
        named = strategy.get("name") if isinstance(strategy, dict) else strategy
        return self.path.resolve().name if self.path else str(named or "run")

    def headlines(self) -> list[tuple[str, str, str]]:
        """(key, label, final value as text with its unit) of the results that exist; totals of 0 say nothing."""
        out, known = [], [key for key, _ in HEADLINES]
        own = [(key, heading(key)) for key in self.test_metrics() if key not in known]
        for key, label in [*own, *HEADLINES]:
            values = self.series(key)[1]
            total = key.startswith("bits") or key.endswith("seconds")
            if len(values) and values.ndim == 1 and not (total and values[-1] == 0):
                out.append((key, label, show(key, float(values[-1]))))
        return out

    def __repr__(self) -> str:
        results = "; ".join(f"{label.lower()} {value}" for _, label, value in self.headlines())
        return f"History({self.name}: {results or 'no rows'})"

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left;font-weight:normal">{escape(label)}</th>'
            f'<td style="text-align:right;font-variant-numeric:tabular-nums">{escape(value)}</td></tr>'
            for _, label, value in self.headlines()
        )
        return f"<table><caption style='text-align:left'><b>{escape(self.name)}</b></caption>{cells}</table>"


def heading(key: str) -> str:
    """A key as a heading."""
    return key.replace("_", " ").capitalize()


def axis_scale(key: str, largest: float) -> tuple[float, str]:
    """(divisor, axis label with its unit) for values of `key` up to `largest`.

    >>> axis_scale("bits_up", 2.5e9)
    (1000000000.0, 'sent by clients (Gbit)')
    """
    label = _LABELS.get(key, key.replace("_", " "))
    if key.startswith("bits"):
        scale, unit = next((s for s in _BITS if largest >= s[0]), _BITS[-1])
        return scale, f"{label} ({unit})"
    return 1.0, f"{label} (s)" if key.endswith("seconds") else label


def show(key: str, value: float) -> str:
    """A value as people write it: percent, seconds, bits with a prefix, thousands separated.

    >>> show("test_accuracy", 0.8912), show("bits_up", 12_345_678.0), show("virtual_seconds", 1234.5)
    ('89.1 %', '12.3 Mbit', '1,234 s')
    """
    if not np.isfinite(value):
        return "not finite"
    if "accuracy" in key:
        return f"{100 * value:.1f} %"
    if key.startswith("bits"):
        scale, unit = next((s for s in _BITS if value >= s[0]), _BITS[-1])
        return f"{_three(value / scale)} {unit}"
    return f"{_three(value)} s" if key.endswith("seconds") else _three(value)


def _three(value: float) -> str:
    """Three significant digits, thousands separated, whole numbers whole."""
    if value == int(value) and abs(value) < 1e15 or abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:.3g}"


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    from omegaconf import OmegaConf  # reads 1e-3 as a number, as the run itself did

    with plain_errors(str(file), "; restore the file or start anew"):
        loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return {str(k): v for k, v in loaded.items()} if isinstance(loaded, dict) else {}
