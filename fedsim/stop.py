"""When a run ends before its last round, and how its metrics went: what its rows say, one after the other.

A metric's bound is reached from the side that `fedsim.metrics.small_is_good` says; seconds and bits add up to theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from fedsim.config import ConfigError, did_you_mean
from fedsim.metrics import small_is_good

EXPLODED = 10.0  # times its first value, a loss that has grown so far is worth a word
WATCHED = ("train_loss", "test_loss", "distance")


class Diverged(RuntimeError):
    """The model, a loss, or what clients send is not finite any more.

    Args:
        round: in which this was seen, from 1.
        what: is not finite.
        way: what may be done beside taking shorter steps.
    """

    def __init__(self, round: int, what: str, way: str = "") -> None:
        super().__init__(
            f"round {round}: {what} not finite, the run diverged; lower local.optimizer.lr or strategy.server_lr, "
            f"clip gradients (local.optimizer.clip){way}"
        )


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Early stopping.

    Args:
        metric: that has to improve.
        rounds: how long the run goes on without it.
    """

    metric: str
    rounds: int

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


@dataclass(frozen=True)
class Stop:
    """What ends a run before its last round; the first that holds does.

    Args:
        bounds: {metric: number}: ends the run when so much was used (virtual_seconds, bits_up), or a metric is as good:
            as small, where its name says loss, error, distance or the like.
        patience: ends it when a metric no longer improves.
    """

    bounds: Mapping[str, float] = field(default_factory=dict)
    patience: Patience | None = None

    def __post_init__(self) -> None:
        for name, bound in self.bounds.items():
            if not isfinite(bound):
                raise ValueError(f"{name} must be finite, got {bound:g}")
            if "accuracy" in name and not 0 <= bound <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {bound:g}")

    @property
    def metrics(self) -> dict[str, str]:
        """{metric that rows must have: the key that names it}."""
        named = {name: name for name in self.bounds}
        return named | ({self.patience.metric: "patience.metric"} if self.patience else {})

    def reached(self, row: Mapping[str, Any]) -> str | None:
        """The bound that this row reached, in words."""
        for name, bound in self.bounds.items():
            value = _number(row, name)
            if value is None or not isfinite(value):
                continue
            if value <= bound if small_is_good(name) else value >= bound:
                return f"{name} {value:.6g} reached {bound:.6g}"
        return None


class Course:
    """How a run goes, row by row.

    Args:
        stop: what may end it.
        rows: those of the calls that this one goes on from.

    Attributes:
        ended: why the last row ended it, in words; None if it did not.
    """

    def __init__(self, stop: Stop, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._stop = stop
        self._known: dict[str, None] = {}  # metrics that rows had, in their order
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._best: tuple[float, int] | None = None  # value of the patience's metric, and its round
        self.ended: str | None = None
        for row in rows:
            self.take(row)

    def take(self, row: Mapping[str, Any]) -> str | None:
        """Note a row; why it ends the run, or None."""
        self._known |= {name: None for name in row if _number(row, name) is not None}
        for name in WATCHED:
            value = _number(row, name)
            if value is not None and isfinite(value):
                self._first.setdefault(name, value)
                self._last[name] = value
        self.ended = self._stop.reached(row) or self._impatient(row)
        return self.ended

    def check_known(self) -> None:
        """Refuse to wait for a metric that no row had so far, once the model was evaluated.

        Raises:
            ConfigError: naming those that there are.
        """
        for name, key in self._stop.metrics.items():
            if name not in self._known:
                raise ConfigError(f"stop.{key}: no row has a number {name!r}{did_you_mean(name, self._known)}")

    def exploded(self) -> str | None:
        """What a loss did that ended far above its start, in words."""
        for name, last in self._last.items():
            if 0 < self._first[name] * EXPLODED < last:
                return (
                    f"{name} rose from {self._first[name]:.4g} to {last:.4g}, the run went astray; lower "
                    "local.optimizer.lr or strategy.server_lr, or clip gradients (local.optimizer.clip)"
                )
        return None

    def _impatient(self, row: Mapping[str, Any]) -> str | None:
        patience = self._stop.patience
        value = None if patience is None else _number(row, patience.metric)
        if patience is None or value is None or not (isfinite(value) or self._best):
            return None
        sign = 1 if small_is_good(patience.metric) else -1
        if self._best is None or (isfinite(value) and sign * value < sign * self._best[0]):
            self._best = value, row["round"]
        best, since = self._best
        if row["round"] - since < patience.rounds:
            return None
        return f"{patience.metric} was best in round {since} ({best:.6g}), {row['round'] - since} rounds ago"


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
