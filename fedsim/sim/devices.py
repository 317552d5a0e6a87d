"""Devices: how long a job takes. Every model returns seconds for a stack of jobs, keyed by (seed, client, job).

    duration = download bits / downlink + work + upload bits / uplink

Work is steps * seconds_per_step for the models whose clients compute, or a whole job's duration for those whose
clocks come from a paper (`f_x`, `exponential`; nothing for a job without steps). A new model is a class here and a
row in the table.

Letters: N clients, R jobs.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedsim.streams import Streams

FORGOTTEN = 40.0  # of a chain's jobs, in its memories, the state has nothing left: one part in e^40


class Devices(Protocol):
    """Durations of jobs."""

    @property
    def random(self) -> bool:
        """Whether two jobs of one client with equal work may take different times."""
        ...

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        """[R] float64 durations of jobs that take `steps` local steps and carry so many bits."""
        ...


@runtime_checkable
class Memoryless(Devices, Protocol):
    """Random clocks whose jobs take a known time at least, and an exponential one on top."""

    def law(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> tuple[Tensor, Tensor]:
        """([R] seconds at least, [R] mean of the rest) of such jobs."""
        ...


def law(
    devices: Devices, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor
) -> tuple[Tensor, Tensor] | None:
    """([R] seconds at least, [R] mean of an exponential rest) of such jobs; None where they must be drawn."""
    if isinstance(devices, Memoryless):
        return devices.law(streams, steps, bits_down, bits_up)
    if devices.random:
        return None
    least = devices.seconds(streams, steps, bits_down, bits_up)
    return least, torch.zeros_like(least)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Every client is equally fast.

    Args:
        seconds_per_step: seconds of one local step.
        downlink, uplink: bits per second; infinite by default.
    """

    seconds_per_step: float = 0.01
    downlink: float = inf
    uplink: float = inf
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check("seconds_per_step", self.seconds_per_step, self.downlink, self.uplink)

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        return bits_down / self.downlink + steps * self.seconds_per_step + bits_up / self.uplink


@dataclass(frozen=True, kw_only=True)
class FX:
    """Evenly spaced clocks: client i of N takes slowest * (1 - x/100 * i / (N - 1)) seconds a job.

    Fraboni, Vidal, Kameni, Lorenzi. arXiv:2206.10189, section 5: F-0 are equal clocks, F-80 the fastest takes a fifth.

    Args:
        x: percent by which the fastest client is faster than the slowest.
        count: N, filled in from clients.count.
        slowest: seconds of the slowest client's job, transfers included.
        downlink, uplink: bits per second, on top; infinite by default.
    """

    x: float = 80.0
    count: int
    slowest: float = 1.0
    downlink: float = inf
    uplink: float = inf
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_x(self.x)
        _check("slowest", self.slowest, self.downlink, self.uplink)

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        work = torch.where(steps > 0, _f_x(streams, self.slowest, self.x, self.count), 0.0)
        return bits_down / self.downlink + work + bits_up / self.uplink


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Every client's step takes a time of its own, drawn once from [low, high].

    Args:
        low, high: seconds of one local step.
        downlink, uplink: bits per second; infinite by default.
    """

    low: float = 0.005
    high: float = 0.05
    downlink: float = inf
    uplink: float = inf
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check("low", self.low, self.downlink, self.uplink)
        if self.high < self.low:
            raise ValueError(f"high must be at least low={self.low} seconds, got {self.high}")

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        share = _own(streams).uniform("device", 1, dtype=torch.float64)[:, 0]
        per_step = self.low + (self.high - self.low) * share
        return bits_down / self.downlink + steps * per_step + bits_up / self.uplink


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """A client's step takes median * exp(sigma * z) seconds, z drawn once; jobs vary by exp(jitter * z').

    Args:
        median: seconds of one local step of the median client.
        sigma: spread over clients.
        jitter: spread over the jobs of one client.
        downlink, uplink: bits per second of the median client; links slow down by the client's own factor.
    """

    median: float = 0.01
    sigma: float = 0.5
    jitter: float = 0.0
    downlink: float = inf
    uplink: float = inf

    def __post_init__(self) -> None:
        _check("median", self.median, self.downlink, self.uplink)
        if self.sigma < 0 or self.jitter < 0:
            raise ValueError(f"sigma and jitter must not be negative, got {self.sigma} and {self.jitter}")

    @property
    def random(self) -> bool:
        return self.jitter > 0

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        z = _own(streams).normal("device", 1, dtype=torch.float64)[:, 0]
        factor = torch.exp(self.sigma * z)
        if self.jitter:
            factor = factor * torch.exp(self.jitter * streams.normal("job", 1, dtype=torch.float64)[:, 0])
        return factor * (bits_down / self.downlink + steps * self.median + bits_up / self.uplink)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Memoryless jobs: exponential with the mean of an F-X clock, plus a constant shift.

    Args:
        mean: seconds of the slowest client's mean job.
        x: percent by which the fastest client is faster; 0 makes all alike.
        count: N, filled in from clients.count.
        shift: seconds that every job takes at least.
        downlink, uplink: bits per second, on top; infinite by default.
    """

    mean: float = 1.0
    x: float = 0.0
    count: int
    shift: float = 0.0
    downlink: float = inf
    uplink: float = inf
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_x(self.x)
        _check("mean", self.mean, self.downlink, self.uplink)
        if self.shift < 0:
            raise ValueError(f"shift must be 0 or more seconds, got {self.shift}")

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        u = streams.uniform("job", 1, dtype=torch.float64)[:, 0]
        work = torch.where(steps > 0, self.shift - self._mean(streams) * torch.log1p(-u), 0.0)
        return bits_down / self.downlink + work + bits_up / self.uplink

    def law(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> tuple[Tensor, Tensor]:
        works = steps > 0
        least = bits_down / self.downlink + self.shift * works.double() + bits_up / self.uplink
        return least, torch.where(works, self._mean(streams), 0.0)

    def _mean(self, streams: Streams) -> Tensor:
        return _f_x(streams, self.mean, self.x, self.count)


@dataclass(frozen=True, kw_only=True)
class ShiftedExponential(Exponential):
    """Exponential jobs that take at least `shift` seconds."""

    shift: float = 0.5


@dataclass(frozen=True, kw_only=True)
class GilbertElliott:
    """Bursty clients: each is fast or slow, and changes from one job to the next with a small probability.

    Gilbert. Capacity of a Burst-Noise Channel. 1960; Elliott. 1963. A chain of two states is the same as one that in
    every job is drawn anew with probability to_slow + to_fast, whatever it was, and else stays: so the state is that of
    the last draw, and no job needs those before it to have run. [derived; tested by its law]

    Args:
        seconds_per_step: seconds of one local step of a fast client.
        slowdown: by which a slow client's steps take longer.
        to_slow, to_fast: probabilities of a change from one job to the next; they sum to at most 1. A client is slow in
            to_slow / (to_slow + to_fast) of its jobs, 1 / to_fast of them in a row.
        downlink, uplink: bits per second; infinite by default.
    """

    seconds_per_step: float = 0.01
    slowdown: float = 10.0
    to_slow: float = 0.05
    to_fast: float = 0.25
    downlink: float = inf
    uplink: float = inf
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check("seconds_per_step", self.seconds_per_step, self.downlink, self.uplink)
        if not 1 <= self.slowdown < inf:
            raise ValueError(f"slowdown must be at least 1, got {self.slowdown}")
        if not (self.to_slow > 0 and self.to_fast > 0 and self.to_slow + self.to_fast <= 1):
            raise ValueError(
                f"to_slow and to_fast must be positive and sum to at most 1, got {self.to_slow} and {self.to_fast}"
            )

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        per_step = self.seconds_per_step * (1 + (self.slowdown - 1) * self.slow(streams).double())
        return bits_down / self.downlink + steps * per_step + bits_up / self.uplink

    def slow(self, streams: Streams) -> Tensor:
        """[R] bool: whether clients are slow in these jobs."""
        anew = self.to_slow + self.to_fast
        out, open, jobs = (
            torch.zeros(len(streams.jobs), dtype=torch.bool),
            torch.arange(len(streams.jobs)),
            streams.jobs,
        )
        for back in range(ceil(FORGOTTEN / anew)):
            u = Streams(streams.seed, streams.clients[open], jobs - back).uniform("burst", 2, dtype=torch.float64)
            out[open] = u[:, 1] * anew < self.to_slow
            stays = (u[:, 0] >= anew) & (jobs != back)  # the first job is drawn
            open, jobs = open[stays], jobs[stays]
        return out


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Speeds of every client from a CSV file: client, seconds_per_step and, if known, downlink and uplink.

    Args:
        path: the file; one line a client, ids 0 to N - 1.
        count: N, filled in from clients.count.
    """

    path: str
    count: int
    table: Tensor = field(init=False, repr=False)
    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", _read_speeds(Path(self.path), self.count))

    def seconds(self, streams: Streams, steps: Tensor, bits_down: Tensor, bits_up: Tensor) -> Tensor:
        per_step, down, up = self.table[streams.clients].unbind(1)
        return bits_down / down + steps * per_step + bits_up / up


def _read_speeds(path: Path, count: int) -> Tensor:
    """[N, 3] float64: seconds per step, downlink, uplink."""
    try:
        with path.open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"path {path}: can't be read ({e}); give a CSV file with client,seconds_per_step") from e
    table = torch.full((count, 3), float("nan"), dtype=torch.float64)
    for line, row in enumerate(rows, start=2):
        try:
            client = int(row["client"])
            speeds = [
                float(row["seconds_per_step"]),
                float(row.get("downlink") or inf),
                float(row.get("uplink") or inf),
            ]
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, line {line}: needs client and seconds_per_step as numbers, got {row}") from e
        if not 0 <= client < count:
            raise ValueError(f"{path}, line {line}: client {client} is not one of the {count} clients 0..{count - 1}")
        if not (0 <= speeds[0] < inf and speeds[1] > 0 and speeds[2] > 0):
            raise ValueError(f"{path}, line {line}: seconds must be 0 or more and links positive, got {speeds}")
        table[client] = torch.tensor(speeds, dtype=torch.float64)
    missing = torch.nonzero(table[:, 0].isnan()).flatten().tolist()
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{path}: no line for {len(missing)} of {count} clients ({shown}); add them or lower clients.count"
        )
    return table


def _f_x(streams: Streams, slowest: float, x: float, count: int) -> Tensor:
    """[R] seconds of evenly spaced clocks, of which the fastest is x percent faster than the slowest."""
    place = streams.clients.double() / max(count - 1, 1)
    return slowest * (1 - x / 100 * place)


def _own(streams: Streams) -> Streams:
    """Streams of the clients themselves, the same for all of their jobs."""
    return Streams(streams.seed, streams.clients, torch.zeros_like(streams.jobs))


def _check_x(x: float) -> None:
    if not 0 <= x < 100:
        raise ValueError(f"x must be a percentage in [0, 100), got {x}")


def _check(name: str, seconds: float, downlink: float, uplink: float) -> None:
    if not 0 <= seconds < inf:
        raise ValueError(f"{name} must be 0 or more seconds, got {seconds}")
    for link, value in (("downlink", downlink), ("uplink", uplink)):
        if not value > 0:
            raise ValueError(f"{link} must be positive bits per second, got {value}")


DEVICES: dict[str, Callable[..., Devices]] = {
    "constant": Constant,
    "f_x": FX,
    "uniform": Uniform,
    "lognormal": LogNormal,
    "exponential": Exponential,
    "shifted_exponential": ShiftedExponential,
    "gilbert_elliott": GilbertElliott,
    "trace": Trace,
}
