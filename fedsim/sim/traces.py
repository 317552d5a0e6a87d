"""Availability from a file: when real devices were on line.

Two kinds of tables are read, as CSV or Parquet, told apart by their columns:

- client, active, inactive and perhaps finish_time, as FedScale has them: on line from one time to the other; a row for
  each such interval, or (in Parquet) a row for each client with two lists. After finish_time it begins again.
- id, timestamp, as the activity pings that FLGo reads have them: on line for the 15 seconds, on a grid that begins with
  the first ping, in which one falls.

FedScale's own file is a pickle, which can run any code when it is read, and its clients and FLGo's have other names
than 0..N-1; write the columns to a table with the clients of the experiment.

Letters: N clients, M intervals, R clients that are asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-6  # seconds: whoever is asked of at the moment of a change must see it
PING = 15.0  # seconds for which a ping stands
NAMES = ("client", "client_id", "id")


@dataclass(frozen=True, eq=False)
class Trace:
    """On line as a table says.

    Args:
        first: [N + 1] where each client's intervals begin among all.
        starts, ends: [M] float64 seconds; a client's intervals ascend and do not touch.
        period: [N] float64 seconds after which they begin again; inf for never.
    """

    first: Tensor
    starts: Tensor
    ends: Tensor
    period: Tensor

    def on_line(self, seed: int, ids: Tensor, now: float) -> Tensor:
        at, _ = self._local(ids, now)
        k = self._last(ids, at)
        return (k >= self.first[ids]) & (at < self.ends[k.clamp(min=0)])

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        at, begun = self._local(ids, now)
        first, after, k = self.first[ids], self.first[ids + 1], self._last(ids, at)
        again, head = self.period[ids], first.clamp(max=len(self.starts) - 1)
        on = (k >= first) & (at < self.ends[k.clamp(min=0)])
        end = self.ends[k.clamp(min=0)]
        through = (end == again) & (self.starts[head] == 0)  # on line over the end of a period
        end = torch.where(through, torch.where(self.ends[head] == again, inf, again + self.ends[head]), end)
        more = k + 1 < after
        start = torch.where(more, self.starts[(k + 1).clamp(max=len(self.starts) - 1)], again + self.starts[head])
        start = torch.where(first == after, inf, start)
        return begun + torch.where(on, end, start)

    def _local(self, ids: Tensor, now: float) -> tuple[Tensor, Tensor]:
        """([R] seconds since the trace last began for each, [R] when that was)."""
        period = self.period[ids]
        begun = torch.where(period.isinf(), 0.0, torch.floor((now + ROUNDING) / period) * period)
        return now + ROUNDING - begun, begun

    def _last(self, ids: Tensor, at: Tensor) -> Tensor:
        """[R] each client's last interval that has begun; the one before its first if none has."""
        low, high = self.first[ids] - 1, self.first[ids + 1]
        while bool((high - low > 1).any()):
            middle = (low + high) // 2
            begun = (self.starts[middle.clamp(min=0)] <= at) & (middle > low)
            low, high = torch.where(begun, middle, low), torch.where(begun | (middle == low), high, middle)
        return low


def trace(*, path: str, count: int, period: float | None = None) -> Trace:
    """When real devices were on line, from a CSV or Parquet file.

    Args:
        path: the file, with columns client, active, inactive (and finish_time), or id, timestamp.
        count: N, filled in from clients.count; the file has the clients 0 to N - 1.
        period: seconds after which it begins again; null is the file's finish_time, or never.
    """
    if period is not None and not 0 < period < inf:
        raise ValueError(f"period must be positive seconds, got {period}")
    columns = _read(Path(path))
    name = next((n for n in NAMES if n in columns), None)
    kinds = {("active", "inactive"): _intervals, ("timestamp",): _pings}
    kind = next((make for needs, make in kinds.items() if all(n in columns for n in needs)), None)
    if name is None or kind is None:
        raise ValueError(
            f"path {path}: has the columns {', '.join(columns)}; needs client, active, inactive, or id, timestamp"
        )
    clients, starts, ends = kind(columns, columns[name])
    _check(path, columns[name], clients, starts, ends, count)
    order = np.argsort(clients, kind="stable")
    clients, starts, ends = clients[order].astype(np.int64), starts[order], ends[order]
    wrong = (clients[1:] == clients[:-1]) & (starts[1:] < ends[:-1])
    if wrong.any():
        k = int(wrong.argmax())
        raise ValueError(
            f"path {path}: client {clients[k]}: {starts[k + 1]:g} comes after an interval that ends at {ends[k]:g}; "
            "sort each client's intervals by time, and let none overlap"
        )
    periods = _periods(path, columns, columns[name], clients, ends, count, period)
    return _joined(clients, starts, ends, torch.from_numpy(periods), count)


def _joined(clients: np.ndarray, starts: np.ndarray, ends: np.ndarray, period: Tensor, count: int) -> Trace:
    """A trace of intervals that may touch."""
    touch = (clients[1:] == clients[:-1]) & (starts[1:] <= ends[:-1])
    begins, stops = np.concatenate([[True], ~touch]), np.concatenate([~touch, [True]])
    num = np.bincount(clients[begins], minlength=count)
    first = torch.from_numpy(np.concatenate([[0], np.cumsum(num)]))
    return Trace(first, torch.from_numpy(starts[begins].copy()), torch.from_numpy(ends[stops].copy()), period)


def _read(path: Path) -> dict[str, Any]:
    """{column: values [rows], or a list of lists}, of a file that can be read."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    read = pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv
    try:
        table = read(path)
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"path {path}: can't be read ({str(e).splitlines()[0]}); give a CSV or Parquet file") from e
    if not len(table):
        raise ValueError(f"path {path}: has no rows; every client needs one at least")
    lists = [n for n in table.column_names if pa.types.is_list(table[n].type) or pa.types.is_large_list(table[n].type)]
    out: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name]
        if column.null_count:
            raise ValueError(f"path {path}: column {name} has {column.null_count} missing values; fill or drop them")
        out[name] = column.to_pylist() if name in lists else column.to_numpy()
    for name in (n for n in (*NAMES, "active", "inactive", "finish_time", "timestamp") if n in out):
        if name in lists and name in ("active", "inactive"):
            kind = table[name].type.value_type
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise ValueError(f"path {path}: column {name} must hold lists of numbers")
        elif name in lists or out[name].dtype.kind not in "iuf" or not np.isfinite(out[name]).all():
            raise ValueError(f"path {path}: column {name} must hold finite numbers")
    if ("active" in lists) != ("inactive" in lists):
        raise ValueError(f"path {path}: active and inactive must both hold numbers, or both lists of numbers")
    return out


def _intervals(columns: dict[str, Any], clients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    active, inactive = columns["active"], columns["inactive"]
    if isinstance(active, list):
        lengths = [len(a) for a in active]
        if lengths != [len(b) for b in inactive]:
            raise ValueError("active and inactive must have equally many times for each client")
        clients = np.repeat(clients, lengths)
        active, inactive = (np.array([t for times in each for t in times]) for each in (active, inactive))
    return clients, active.astype(np.float64), inactive.astype(np.float64)


def _pings(columns: dict[str, Any], clients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each ping's place on the grid, those of one place once."""
    at = columns["timestamp"].astype(np.float64)
    starts = np.floor((at - at.min()) / PING) * PING
    order = np.argsort(clients, kind="stable")
    of, when = clients[order], starts[order]
    again = np.concatenate([[False], (of[1:] == of[:-1]) & (when[1:] == when[:-1])])
    return of[~again], when[~again], when[~again] + PING


def _check(path: str, rows: np.ndarray, clients: np.ndarray, starts: np.ndarray, ends: np.ndarray, count: int) -> None:
    """Refuse intervals that are none, clients that the experiment has not, and clients that the file has not."""
    other = (rows < 0) | (rows >= count) | (rows != np.floor(rows))
    if other.any():
        raise ValueError(
            f"path {path}: client {rows[other][0]:g} is not one of the {count} clients 0..{count - 1}; number the "
            "file's clients from 0, or change clients.count"
        )
    none = ~((0 <= starts) & (starts < ends))
    if none.any():
        k = int(none.argmax())
        raise ValueError(
            f"path {path}: client {clients[k]:g} is on line from {starts[k]:g} to {ends[k]:g}; times are seconds from "
            "0 on, and each interval ends after it begins"
        )
    missing = np.setdiff1d(np.arange(count), clients)
    if len(missing):
        shown = ", ".join(map(str, missing[:5].tolist())) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"path {path}: no interval for {len(missing)} of {count} clients ({shown}); add them or lower clients.count"
        )


def _periods(
    path: str,
    columns: dict[str, Any],
    rows: np.ndarray,
    clients: np.ndarray,
    ends: np.ndarray,
    count: int,
    period: float | None,
) -> np.ndarray:
    """[N] seconds after which each client's trace begins again."""
    out = np.full(count, inf if period is None else period)
    if period is None and "finish_time" in columns:
        out[rows.astype(np.int64)] = columns["finish_time"]
        if (out[rows.astype(np.int64)] != columns["finish_time"]).any():
            raise ValueError(f"path {path}: a client has several values of finish_time; give it one")
    late = ends > out[clients]
    if late.any():
        k = int(late.argmax())
        raise ValueError(
            f"path {path}: client {clients[k]} is on line until {ends[k]:g}, after its trace begins again at "
            f"{out[clients[k]]:g}; raise the period"
        )
    return out
