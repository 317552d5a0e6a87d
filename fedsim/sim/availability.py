"""Availability: when clients can be reached. Every law tells of any moment by itself, keyed by (seed, client).

A client is on line or off, from some moment on (that moment included) until its next change. Nothing is kept of what
was asked before, so a run may ask of any client at any time, in any order. A new law is a class here and a row in the
table; traces of real devices are in `fedsim.sim.traces`.

Letters: R clients that are asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from math import floor, inf
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim.sim.traces import trace
from fedsim.streams import Streams

AT_ONCE = 1 << 17  # draws that are made together at most, where one moment needs fewer
MOST = 1 << 26  # draws, some seconds' worth, after which a law says that whoever has not changed by then never does
ROUNDING = 1e-9  # of a period or a slot: whoever is asked of at the moment of a change must see it


class Availability(Protocol):
    """Who is on line when."""

    def on_line(self, seed: int, ids: Tensor, now: float) -> Tensor:
        """[R] bool: which of these clients are on line at a time in seconds."""
        ...

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        """[R] float64 seconds, after `now`, when each next comes or goes; inf for never.

        A law that has to look for it looks no further than to the time `before`, and not for ever: it says inf for
        those beyond.
        """
        ...


@dataclass(frozen=True)
class Always:
    """Every client can be reached at any time."""

    def on_line(self, seed: int, ids: Tensor, now: float) -> Tensor:
        return torch.ones(len(ids), dtype=torch.bool)

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        return torch.full((len(ids),), inf, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Bernoulli:
    """In every slot of some seconds each client is on line with probability p, independently.

    Args:
        p: the probability, in (0, 1].
        seconds: of a slot.
    """

    p: float
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be a probability in (0, 1], got {self.p}")
        _positive("seconds", self.seconds)

    def on_line(self, seed: int, ids: Tensor, now: float) -> Tensor:
        return self._in_slot(seed, ids, torch.tensor([self._slot(now)]))

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        slot, out = self._slot(now), torch.full((len(ids),), inf, dtype=torch.float64)
        here, open, looked = self._in_slot(seed, ids, torch.tensor([slot])), torch.arange(len(ids)), 0
        slot += 1
        while len(open) and slot * self.seconds < before and looked < MOST:
            slots = slot + torch.arange(_stretch(looked, len(open)))
            of, at = open.repeat_interleave(len(slots)), (slots.double() * self.seconds).repeat(len(open))
            turned = (self._in_slot(seed, ids[of], slots.repeat(len(open))) != here[of]) & (at < before)
            out.scatter_reduce_(0, of[turned], at[turned], "amin")
            open, slot, looked = open[out[open].isinf()], slot + len(slots), looked + len(of)
        return out

    def _slot(self, now: float) -> int:
        return floor(now / self.seconds + ROUNDING)

    def _in_slot(self, seed: int, ids: Tensor, slots: Tensor) -> Tensor:
        """[R] bool, in a slot of each, [R], or one of all, [1]."""
        return Streams(seed, ids, slots).uniform("availability", 1, dtype=torch.float64)[:, 0] < self.p


@dataclass(frozen=True, kw_only=True)
class Diurnal:
    """Each client is on line for the first part of its day, and days begin at a time of its own.

    Args:
        period: seconds of a day.
        share: of the day for which it is on line, in (0, 1].
        spread: over which part of the day the clients' days begin, evenly at random; 0 is at the same time for all,
            when the run begins.
    """

    period: float = 86400.0
    share: float = 0.5
    spread: float = 1.0

    def __post_init__(self) -> None:
        _positive("period", self.period)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread is a part of the period and must lie in [0, 1], got {self.spread}")

    def on_line(self, seed: int, ids: Tensor, now: float) -> Tensor:
        return self._day(seed, ids, now)[0]

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        if self.share == 1:
            return torch.full((len(ids),), inf, dtype=torch.float64)
        on, begins = self._day(seed, ids, now)
        return torch.where(on, begins + self.share, begins + 1) * self.period

    def _day(self, seed: int, ids: Tensor, now: float) -> tuple[Tensor, Tensor]:
        """([R] whether each is in the first part of its day, [R] when that began, in periods)."""
        begins = Streams(seed, ids, torch.zeros_like(ids)).uniform("availability", 1, dtype=torch.float64)[:, 0]
        passed = now / self.period - begins * self.spread + ROUNDING
        return passed - passed.floor() < self.share, passed.floor() + begins * self.spread


@dataclass(frozen=True, kw_only=True)
class Markov:
    """Clients come and go: on line and off line for exponential times, one after the other.

    A chain of two states is the same as one that is drawn anew, whatever it was, at the events of a Poisson process of
    rate 1 / on + 1 / off: on line with probability on / (on + off). So the state of a moment is what the last draw
    before it gave, and draws are keyed by the spans of on * off / (on + off) seconds in which they fall; in each, the
    times between draws are exponential from its start on, for such times know no past. [derived; tested by its law]

    Args:
        on_seconds, off_seconds: means. (A bare `on` is a truth value to YAML.)
    """

    on_seconds: float
    off_seconds: float

    def __post_init__(self) -> None:
        _positive("on_seconds", self.on_seconds)
        _positive("off_seconds", self.off_seconds)

    def on_line(self, seed: int, ids: Tensor, now: float) -> Tensor:
        at, on, open = now * self._rate + ROUNDING, torch.empty(len(ids), dtype=torch.bool), torch.arange(len(ids))
        span = floor(at)
        while len(open) and span >= 0:
            drawn = torch.zeros(len(open), dtype=torch.bool)
            for rows, _, states in self._draws(seed, ids[open], torch.tensor([span]), until=at):
                on[open[rows]], drawn[rows] = states, True
            open, span = open[~drawn], span - 1
        first = Streams(seed, ids[open], torch.tensor([-1])).uniform("availability", 1, dtype=torch.float64)[:, 0]
        on[open] = first < self._share
        return on

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        at, out = now * self._rate + ROUNDING, torch.full((len(ids),), inf, dtype=torch.float64)
        on, open, span, looked = self.on_line(seed, ids, now), torch.arange(len(ids)), floor(at), 0
        while len(open) and span < before * self._rate and looked < MOST:
            spans = span + torch.arange(_stretch(looked, len(open)))
            each = open.repeat_interleave(len(spans))
            for rows, times, states in self._draws(seed, ids[each], spans.repeat(len(open))):
                turned = (times > at) & (states != on[each[rows]])
                out.scatter_reduce_(0, each[rows[turned]], times[turned] / self._rate, "amin")
            open, span, looked = open[out[open].isinf()], span + len(spans), looked + len(each)
        return torch.where(out < before, out, inf)

    @property
    def _rate(self) -> float:
        return 1 / self.on_seconds + 1 / self.off_seconds

    @property
    def _share(self) -> float:
        return self.on_seconds / (self.on_seconds + self.off_seconds)

    def _draws(
        self, seed: int, ids: Tensor, spans: Tensor, until: float = inf
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(whose [K], when [K] in spans, whether on line then [K]) of the first draws, the second draws, ...

        Args:
            seed, ids: of the run, and [R] clients.
            spans: [R] in which, or one for all, [1].
            until: draws after this time are left out, in spans.
        """
        rows, passed = torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.float64)
        for k in count():
            u = Streams(seed, ids, spans).uniform("availability", 2, step=k, dtype=torch.float64)
            passed = passed - torch.log1p(-u[:, 0])
            at = spans + passed
            left = torch.nonzero((passed < 1) & (at <= until)).flatten()
            if not len(left):
                return
            rows, passed, ids, spans = rows[left], passed[left], ids[left], spans if len(spans) == 1 else spans[left]
            yield rows, at[left], u[left, 1] < self._share


def _stretch(looked: int, clients: int) -> int:
    """How many slots to look at together for so many clients: as many as were before, so that few are in vain."""
    return max(1, min(looked, AT_ONCE) // clients)


def _positive(name: str, seconds: float) -> None:
    if not 0 < seconds < inf:
        raise ValueError(f"{name} must be positive seconds, got {seconds}")


AVAILABILITY: dict[str, Callable[..., Any]] = {
    "always": Always,
    "bernoulli": Bernoulli,
    "diurnal": Diurnal,
    "markov": Markov,
    "trace": trace,
}
