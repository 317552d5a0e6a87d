"""SR-SGC: gradient coding whose workers repeat, B rounds later, what too few of them returned.

Krishnan, Ebrahimi, Khisti. Sequential Gradient Coding For Straggler Mitigation. arXiv:2211.13802, selective repetition.
A (B, W, lambda)-bursty pattern of stragglers is borne with a code of s = ceil(B lambda / (W - 1 + B)), fewer than
gradient coding alone would need: of job t - B, which v > s workers owe, v - s of them do their part again in round t.

From the authors' code: the lowest indices repeat, and the burst count forgets a round in which nobody repeated and
whose own job was decoded at once. A worker keeps nothing between rounds: it is sent the model of the job at hand.

Letters: n workers, P parameters, t a round and the job that starts in it; T = B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.oracle import coded_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.codes import Code, CodeName
from fedsim.strategies.coding import Bursts, Coding, Part
from fedsim.strategies.coding import State as CodingState


@dataclass(frozen=True)
class Owed:
    """A job that could not be decoded in its own round, and what came of it."""

    job: int
    part: Part


@dataclass(frozen=True)
class State(CodingState):
    """owed: jobs of the last B rounds that cannot be decoded yet; past: [n] stragglers of each of the last W - 1."""

    owed: tuple[Owed, ...] = ()
    past: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SRSGC(Coding):
    """Gradient descent that bears bursts of stragglers by selective repetition.

    Args:
        B: rounds that a burst lasts at most; it divides W - 1.
        W: rounds of a window.
        lam: lambda, distinct stragglers in a window at most.
        code: cyclic, for any s, or repetition, where s + 1 divides n.
    """

    B: int
    W: int
    lam: int
    code: CodeName = "cyclic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bursts.W - 1) % self.B:
            fitting = (self.W - 1) // self.B * self.B + 1
            raise ValueError(
                f"B={self.B} must divide W - 1 = {self.W - 1}, or repetitions may fall into a burst; take "
                f"W={max(fitting, self.B + 1)} or W={fitting + self.B}"
            )
        _ = self.gc

    @property
    def bursts(self) -> Bursts:
        return Bursts(self.B, self.W, self.lam, self.count)

    @property
    def gc(self) -> Code:
        s = -(-self.B * self.lam // (self.W - 1 + self.B))
        return Code(self.code, self.count, s, f" (from B={self.B}, W={self.W}, lam={self.lam})")

    @property
    def borne(self) -> int:
        return self.gc.s

    @property
    def delay(self) -> int:
        return self.B

    @property
    def load(self) -> float:
        return (self.gc.s + 1) / self.count

    def init(self, x0: Tensor) -> State:
        return State(x0, self.copies(x0))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        t, gc, nobody = s.round, self.gc, torch.zeros(self.count, dtype=torch.bool)
        due = next((owed.part for owed in s.owed if owed.job == t - self.B), None)
        again = nobody if due is None else self.repeating(due)
        fresh = ~again & self.starts(t)
        cost = Cost(steps=self.steps())
        fleet.present(self.needed(self.count))  # waits for as many as it takes to decode a job at once
        fleet.send(fleet.clients[again], self.repeat, cost=cost, x=self.model(s, t - self.B))
        fleet.send(fleet.clients[fresh], self.coded, cost=cost, x=self.model(s, t))

        def bears(answered: Tensor) -> bool:
            in_time = due is None or gc.suffices(due.answered | again & answered)
            return in_time and self.bursts.conforms(s.past, (again | fresh) & ~answered)

        heard = self.listen(fleet, again | fresh, bears)
        owed = tuple(o for o in s.owed if o.job > t - self.B)
        if due is not None:  # what cannot be decoded even now, since a worker never answered, is lost
            due = due.and_then(heard.part("l", again, s.x))
            s = self.step(s, t - self.B, gc.sum(due.answered, due.rows)) if gc.suffices(due.answered) else s
        new = heard.part("l", fresh, s.x)
        at_once = gc.suffices(new.answered)
        if at_once:
            s = self.step(s, t, gc.sum(new.answered, new.rows))
        elif self.starts(t):
            owed = (*owed, Owed(t, new))
        counted = nobody if at_once and due is None else heard.late
        s = replace(s, round=t + 1, owed=owed, past=self.bursts.remember(s.past, counted))
        return s, self.metrics(s, heard)

    def repeating(self, due: Part) -> Tensor:
        """[n] bool: who repeats the job that is due: as many as it lacks, the lowest of those who owe it."""
        lacking = len(due.answered) - self.gc.s - int(due.answered.sum())
        return ~due.answered & ((~due.answered).cumsum(0) <= lacking)

    # Client halves

    def coded(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {"l": coded_gradient(clients, x, self.gc.matrix[clients.ids], int(clients.rounds[0]))}

    def repeat(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {"l": coded_gradient(clients, x, self.gc.matrix[clients.ids], int(clients.rounds[0]) - self.B)}
