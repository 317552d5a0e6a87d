"""M-SGC: uncoded chunks that are attempted again, and coded ones that close the gap, several jobs a round.

Krishnan, Ebrahimi, Khisti. Sequential Gradient Coding For Straggler Mitigation. arXiv:2211.13802, multiplexed scheme.
Job t is worked on in the rounds t .. t + T, T = W - 2 + B; in every round a worker does one mini-task for each of the
jobs t, t - 1, .., t - T, and mini-task m belongs to job t - m. In units of 1 / Z, Z = n (B + (W - 1)(lambda + 1)), the
data of every worker are W - 1 chunks D1 of size lambda + 1, its own and uncoded, and B chunks D2 of size 1, whose
groups are coded with GC(n, lambda). The split into D1 and D2 is from memory; its load is that of the authors' table.

  mini-task m < W - 1    the m-th own chunk of D1
  mini-task m >= W - 1   a chunk of D1 that is still missing, else the coded result of group m - (W - 1)

With lambda = n there is no D2, and D1 are W - 1 chunks of equal size. A worker keeps nothing between rounds: it is sent
the models of all jobs that it works on, and the table of who does what.

Letters: n workers, P parameters, t a round and the job that starts in it, J jobs of a round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.oracle import coded_gradient
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet
from fedsim.strategies.codes import Code, CodeName
from fedsim.strategies.coding import Bursts, Coding, Part
from fedsim.strategies.coding import State as CodingState
from fedsim.strategy import Traits

NOTHING = -1  # a mini-task


@dataclass(frozen=True)
class Progress:
    """What came of a job: which chunks of D1 [n, W - 1] bool, their sum [P], and the coded results of each group."""

    d1: Tensor
    sum: Tensor
    groups: tuple[Part, ...] = ()


@dataclass(frozen=True)
class State(CodingState):
    """jobs: the progress of those under way, the newest first; past: [n] stragglers of each of the last W - 1."""

    jobs: tuple[Progress, ...] = ()
    past: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MSGC(Coding):
    """Gradient descent that bears bursts of stragglers with hardly more than the uncoded load.

    Args:
        B: rounds that a burst lasts at most.
        W: rounds of a window.
        lam: lambda, distinct stragglers in a window at most.
        code: of D2: cyclic, for any lambda, or repetition, where lambda + 1 divides n.
    """

    B: int
    W: int
    lam: int
    code: CodeName = "cyclic"
    traits: ClassVar[Traits] = replace(Coding.traits, needs_all="a job needs the uncoded chunks of every worker")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.bursts, self.gc

    @property
    def bursts(self) -> Bursts:
        return Bursts(self.B, self.W, self.lam, self.count)

    @property
    def gc(self) -> Code | None:
        """Of each group of D2; None where lambda = n leaves none."""
        why = f" (lam={self.lam})"
        return Code(self.code, self.count, self.lam, why) if self.lam < self.count else None

    @property
    def delay(self) -> int:
        return self.W - 2 + self.B

    def init(self, x0: Tensor) -> State:
        return State(x0, self.copies(x0))

    @property
    def load(self) -> float:
        if self.lam == self.count:
            return (self.W - 1 + self.B) / (self.count * (self.W - 1))
        return (self.lam + 1) * (self.W - 1 + self.B) / (self.count * (self.B + (self.W - 1) * (self.lam + 1)))

    def round(self, s: State, fleet: Fleet, rng: np.random.Generator) -> tuple[State, dict[str, Any]]:
        t, last = s.round, self.delay
        if self.starts(t):
            new = Progress(torch.zeros(self.count, self.W - 1, dtype=torch.bool), torch.zeros_like(s.x))
            s = replace(s, jobs=(new, *s.jobs))
        ages = [m for m in range(last + 1) if self.starts(t - m)]
        jobs = dict(zip(ages, s.jobs, strict=True))
        tasks = {m: self.mini_tasks(m, job) for m, job in jobs.items()}
        asked = torch.full((self.count,), bool(jobs))
        if jobs:
            cost = Cost(steps=self.steps(len(jobs) / (last + 1)), vectors_up=len(jobs))
            x, table = torch.stack([self.model(s, t - m) for m in ages]), torch.stack([*tasks.values()], dim=1)
            fleet.send(fleet.clients, self.work, cost=cost, x=x, tasks=table, youngest=ages[0])

        def bears(answered: Tensor) -> bool:
            nothing = Part(answered, s.x.new_zeros(self.count, len(s.x)))
            in_time = last not in jobs or self.complete(self.advanced(jobs[last], last, tasks[last], nothing))
            return in_time and self.bursts.conforms(s.past, ~answered)

        heard = self.listen(fleet, asked, bears)
        jobs = {m: self.advanced(job, m, tasks[m], heard.part(f"age{m}", asked, s.x)) for m, job in jobs.items()}
        due = jobs.pop(last, None)
        if due is not None and self.complete(due):  # if not, since a worker never answered, it is lost
            s = self.step(s, t - last, self.gradient(due))
        past = self.bursts.remember(s.past, heard.late)
        return replace(s, round=t + 1, jobs=tuple(jobs.values()), past=past), self.metrics(s, heard)

    def mini_tasks(self, m: int, job: Progress) -> Tensor:
        """[n]: what workers do for a job that is m rounds old: a chunk of D1, or m for one of group m - (W - 1)."""
        if m < self.W - 1:
            return torch.full((self.count,), m)
        missing = (~job.d1).int().argmax(1)  # the first of them
        return torch.where(job.d1.all(1), NOTHING if self.gc is None else m, missing)

    def advanced(self, job: Progress, m: int, tasks: Tensor, part: Part) -> Progress:
        """A job that was m rounds old, with what came of mini-tasks [n]."""
        own = tasks[:, None] == torch.arange(self.W - 1)
        d1 = job.d1 | own & part.answered[:, None]
        total = job.sum + part.rows[own.any(1).to(part.rows.device)].sum(0)
        if m < self.W - 1 or self.gc is None:
            return Progress(d1, total)
        return Progress(d1, total, (*job.groups, part.only(tasks == m)))

    def complete(self, job: Progress) -> bool:
        """Whether a job that was worked on for T + 1 rounds can be decoded."""
        return bool(job.d1.all()) and all(self.gc is None or self.gc.suffices(g.answered) for g in job.groups)

    def gradient(self, job: Progress) -> Tensor:
        """[P], of a complete job."""
        coded = [self.gc.sum(g.answered, g.rows) for g in job.groups if self.gc is not None]
        return torch.stack([job.sum, *coded]).sum(0)

    # Client halves

    def work(self, clients: Cohort, x: Tensor, tasks: Tensor, youngest: int) -> dict[str, Tensor]:
        """One mini-task of each job.

        Args:
            clients: the workers.
            x: [J, P], models of the jobs, the youngest job's first.
            tasks: [n, J].
            youngest: how many rounds ago that one started.
        """
        t, mine = int(clients.rounds[0]), tasks.cpu()[clients.ids]
        ages = range(youngest, youngest + len(x))
        return {f"age{m}": self.mini_task(clients, x[k], mine[:, k], t - m) for k, m in enumerate(ages)}

    def mini_task(self, clients: Cohort, x: Tensor, tasks: Tensor, job: int) -> Tensor:
        """[C, P] for one job's model x [P]."""
        own = torch.nn.functional.one_hot(clients.ids, self.count).double()
        out = x.new_zeros(len(clients), len(x))
        for task in tasks.unique().tolist():
            if task != NOTHING:
                rows = own if task < self.W - 1 or self.gc is None else self.gc.matrix[clients.ids]
                out += coded_gradient(clients, x, rows * (tasks == task)[:, None], job, self.chunk(task))
        return out

    def chunk(self, task: int) -> tuple[int, int, int]:
        """Which part of every client's data a mini-task is about, as in `Schedule.part`."""
        if self.gc is None:
            return task, task + 1, self.W - 1
        first, size = self.W - 1, self.lam + 1
        start, length = (task * size, size) if task < first else (first * size + task - first, 1)
        return start, start + length, first * size + self.B
