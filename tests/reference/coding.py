"""Gradient coding's schemes, worker after worker: who does what in a round, how long it lasts, what is decoded.

No gradient is coded here: a decoded one is the gradient of all data, so that the twin takes that. What is simulated is
the master's table of what came back, as sets of workers.

Letters: n workers, s, B, W, lam as in the schemes, J jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

Bears = Callable[[set[int]], bool]


@dataclass
class Round:
    """Seconds, jobs that were decoded at its end, and the stragglers that it did not wait for."""

    seconds: float
    decoded: list[int]
    late: set[int]


@dataclass
class Master:
    """Delays of n workers, [n][number of the worker's job] seconds, and the rule by which a round ends.

    Args:
        delays: without the load's part.
        slope: seconds of an average client's worth of data.
        mu: how much longer than the fastest is waited.
    """

    delays: list[list[float]]
    slope: float = 0.0
    mu: float = 1.0
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.delays)

    def wait(self, asked: set[int], load: float, bears: Bears) -> tuple[float, set[int]]:
        """(seconds, who is given up)."""
        took = {}
        for i in asked:
            k = self.counts.get(i, 0)
            self.counts[i] = k + 1
            took[i] = self.delays[i][k] + self.slope * load
        if not took:
            return 0.0, set()
        limit = (1 + self.mu) * min(took.values())
        late = {i for i in asked if took[i] > limit}
        if late and bears(late):
            return min(limit, max(took.values())), late
        return max(took.values()), set()


class Scheme(Protocol):
    def rounds(self, master: Master, jobs: int) -> Iterator[Round]: ...


@dataclass
class Uncoded:
    def rounds(self, master: Master, jobs: int) -> Iterator[Round]:
        for t in range(jobs):
            seconds, _ = master.wait(set(range(master.n)), 1.0, lambda late: False)
            yield Round(seconds, [t], set())


@dataclass
class GC:
    s: int

    def rounds(self, master: Master, jobs: int) -> Iterator[Round]:
        for t in range(jobs):
            seconds, late = master.wait(set(range(master.n)), self.s + 1, lambda late: len(late) <= self.s)
            yield Round(seconds, [t], late)


def bursty(rounds: list[set[int]], B: int, W: int, lam: int) -> bool:
    """Whether all rounds are (B, W, lam)-bursty, by the definition: in every window of W rounds."""
    for first in range(len(rounds)):
        window = rounds[first : first + W]
        if len(set().union(*window)) > lam:
            return False
        for i in set().union(*window):
            mine = [k for k, late in enumerate(window) if i in late]
            if mine[-1] - mine[0] >= B:
                return False
    return True


@dataclass
class SRSGC:
    B: int
    W: int
    lam: int

    def rounds(self, master: Master, jobs: int) -> Iterator[Round]:
        n, s = master.n, ceil(self.B * self.lam / (self.W - 1 + self.B))
        returned: dict[int, set[int]] = {}  # job -> workers that returned its task
        past: list[set[int]] = []  # as the burst count sees it
        decoded: set[int] = set()
        for t in range(jobs + self.B):
            due = t - self.B
            owing = [i for i in range(n) if due >= 0 and i not in returned[due]]
            again = set(owing[: max(len(owing) - s, 0)]) if due not in decoded else set()
            fresh = set(range(n)) - again if t < jobs else set()

            def bears(late: set[int], past: list[set[int]] = past) -> bool:
                recent = past[max(0, len(past) - self.W + 1) :]
                if len(late.union(*recent)) > self.lam:
                    return False
                return all(not (late & old) for ago, old in enumerate(reversed(past), 1) if self.B <= ago < self.W)

            seconds, late = master.wait(again | fresh, s + 1, bears)
            returned[t] = fresh - late
            done = []
            if again:
                returned[due] |= again - late
                if len(returned[due]) >= n - s:
                    done.append(due)
            if t < jobs and len(returned[t]) >= n - s:
                done.append(t)
            decoded |= set(done)
            past.append(set() if not again and len(late) <= s else late)
            yield Round(seconds, done, late)


@dataclass
class MSGC:
    B: int
    W: int
    lam: int

    def rounds(self, master: Master, jobs: int) -> Iterator[Round]:
        n, T, own = master.n, self.W - 2 + self.B, self.W - 1
        coded = self.lam < n
        load = (self.lam + 1) / (self.B + own * (self.lam + 1)) if coded else 1 / own  # of a mini-task
        first = {t: [set[int]() for _ in range(n)] for t in range(jobs)}  # chunks of D1 that each worker returned
        second = {t: [set[int]() for _ in range(self.B)] for t in range(jobs)}  # workers that returned each group's
        past: list[set[int]] = []
        for t in range(jobs + T):
            plan: list[tuple[int, int, str, int]] = []  # (worker, job, D1 or D2, which)
            alive = [t - m for m in range(T + 1) if 0 <= t - m < jobs]
            for job in alive:
                m = t - job
                for i in range(n):
                    missing = sorted(set(range(own)) - first[job][i])
                    if m < own:
                        plan.append((i, job, "D1", m))
                    elif missing:
                        plan.append((i, job, "D1", missing[0]))
                    elif coded:
                        plan.append((i, job, "D2", m - own))

            def bears(late: set[int], past: list[set[int]] = past) -> bool:
                return bursty([*past, late][-self.W :], self.B, self.W, self.lam)

            seconds, late = master.wait(set(range(n)) if alive else set(), load * len(alive), bears)
            for i, job, kind, which in plan:
                if i not in late:
                    (first[job][i] if kind == "D1" else second[job][which]).add(which if kind == "D1" else i)
            past.append(late)
            due = t - T
            ready = due >= 0 and all(len(c) == own for c in first[due])
            ready = ready and (not coded or all(len(group) >= n - self.lam for group in second[due]))
            yield Round(seconds, [due] if ready else [], late)
