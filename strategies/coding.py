"""What gradient coding's strategies share: the round clock, the straggler model, and models that take turns.

Krishnan, Ebrahimi, Khisti. Sequential Gradient Coding For Straggler Mitigation. arXiv:2211.13802. The round clock is
that of their code: the master waits (1 + mu) times as long as the fastest worker took, and goes on without the others
if the scheme bears it; if not it waits for all, and nobody counts as a straggler. What a straggler computed is lost.

A job is one step of gradient descent on the whole data. It may take T further rounds until its gradient is known, so
M >= T + 1 models take turns: job t steps model t mod M. All models start from the same point, and each goes the way of
gradient descent on the pooled data, exactly (up to rounding) and whatever the scheme. What the loop evaluates is the
model that was stepped last: after J jobs it has seen about J / M of them.

Every worker is asked in every round, and whose data are whose does not matter: it computes gradients of others' data.
Chunks count as equally large in the durations of jobs: a job takes as many steps as chunks of one client's size that it
goes through (n times the normalised load), so that `devices` with seconds_per_step give the delay its slope. To a
code, a worker that is away or drops out is one more that is late.

Letters: n workers, M models, P parameters, t a round and the job that starts in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from fedsim.fleet import Fleet, Replies
from fedsim.strategies.reference import check_lr
from fedsim.strategy import Strategy, Traits

NO_RULE = "the decoder makes one vector of what workers send, and no other rule could"
ALL_WORK = "every worker has a part of every job"


@dataclass(frozen=True)
class Heard:
    """What came of one round.

    Args:
        answered: [n] bool.
        rows: {field: [n, P]}, zeros where nothing came.
        late: [n] bool, the stragglers that the round did not wait for.
        waited: whether it waited for all, though some were late.
    """

    answered: Tensor
    rows: dict[str, Tensor]
    late: Tensor
    waited: bool

    def part(self, name: str, who: Tensor, x: Tensor) -> Part:
        """The answers of workers who [n] bool in one field, for a model x [P]."""
        found = self.rows.get(name)
        return Part(self.answered, x.new_zeros(len(who), len(x)) if found is None else found).only(who)


@dataclass(frozen=True)
class Part:
    """Answers that one sum is decoded from: whose came [n] bool, and rows [n, P], zeros where none did."""

    answered: Tensor
    rows: Tensor

    def only(self, who: Tensor) -> Part:
        """The answers of some workers [n] bool."""
        answered = self.answered & who
        return Part(answered, torch.where(answered.to(self.rows.device)[:, None], self.rows, 0))

    def and_then(self, later: Part) -> Part:
        """With answers of other workers, which came later."""
        return Part(self.answered | later.answered, self.rows + later.rows)


@dataclass(frozen=True)
class State:
    """What every coding server keeps.

    Args:
        x: [P], the model that was stepped last.
        models: [M, P], all of them.
        round: t.
        done: jobs whose step was taken.
    """

    x: Tensor
    models: Tensor
    round: int = 0
    done: int = 0


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class Coding(Strategy):
    """Gradient descent on the pooled data, by workers of whom some are slow.

    Args:
        lr: of a step along the gradient of the mean loss over all samples.
        mu: a worker is late once (1 + mu) times the fastest one's time is over.
        num_models: M; null is T + 1, the least that a scheme's delay T allows.
        num_jobs: after so many no job starts any more, and the rounds left end those under way; null never stops.
        count: n, filled in from clients.count.
    """

    lr: float
    mu: float = 1.0
    num_models: int | None = None
    num_jobs: int | None = None
    count: int
    traits: ClassVar[Traits] = Traits(
        bears_buffers=False,
        no_links="what a compressor leaves out of a coded sum would be multiplied by the decoder's coefficients",
        refused={
            "cohort_size": ALL_WORK,
            "selection": ALL_WORK,
            "server_lr": "it steps by strategy.lr",
            "server_optimizer": "it has several models that take turns, and steps each by strategy.lr",
            "aggregator": NO_RULE,
            "pre_aggregators": NO_RULE,
        },
    )

    def __post_init__(self) -> None:
        check_lr(self.lr)
        if not self.mu >= 0:
            raise ValueError(f"mu must be 0 or more times the fastest worker's time, got {self.mu}")
        if self.num_models is not None and self.num_models <= self.delay:
            raise ValueError(
                f"num_models={self.num_models} models take turns, but a gradient may be known only {self.delay} rounds "
                f"after its own; give at least {self.delay + 1}, or leave it out"
            )
        if self.num_jobs is not None and self.num_jobs < 1:
            raise ValueError(f"num_jobs must be at least 1, got {self.num_jobs}; null never stops")

    @property
    def delay(self) -> int:
        """T: rounds that a job may take beyond its own."""
        return 0

    @property
    def load(self) -> float:
        """Share of all the data that a worker goes through in a round."""
        return 1 / self.count

    @property
    def borne(self) -> int:
        """Workers that may never answer, and still every job is done."""
        return 0

    def replies(self, num_clients: int) -> int:
        return 1  # the first of a round is waited for alone

    def needed(self, num_clients: int) -> int:
        return self.count - self.borne

    def steps(self, part: float = 1.0) -> float:
        """What a round's work, or a part of it, costs a worker: 1 is to go through an average client's data."""
        return self.load * self.count * part

    def starts(self, job: int) -> bool:
        """Whether there is a job of this number."""
        return job >= 0 and (self.num_jobs is None or job < self.num_jobs)

    def copies(self, x0: Tensor) -> Tensor:
        """[M, P]: every model at the start x0 [P]."""
        return x0.repeat(self.delay + 1 if self.num_models is None else self.num_models, 1)

    def model(self, s: State, job: int) -> Tensor:
        """[P]: the model that a job steps, as it was when the job started: no other job steps it in the meantime."""
        return s.models[job % len(s.models)]

    def step(self, s: S, job: int, g: Tensor) -> S:
        """The state after job's step along g [P]."""
        x = self.model(s, job) - self.lr * g
        models = s.models.clone()
        models[job % len(models)] = x
        return replace(s, x=x, models=models, done=s.done + 1)

    def listen(self, fleet: Fleet, asked: Tensor, bears: Callable[[Tensor], bool]) -> Heard:
        """The round's clock, just after jobs were sent.

        Args:
            fleet: the workers.
            asked: [n] bool, who was sent something.
            bears: whether the scheme can go on with the answers of some workers [n] bool and without the others'.
        """
        start, num_asked = fleet.now, int(asked.sum())
        came = [fleet.receive(count=1)] if num_asked else []
        kappa = fleet.now - start
        came += [fleet.receive(until=start + (1 + self.mu) * kappa, count=num_asked - 1)] if num_asked else []
        missing = asked & ~_who(came, self.count)
        waited = bool(missing.any()) and not bears(asked & ~missing)
        if waited:
            came.append(fleet.receive())
            missing = torch.zeros_like(missing)
        elif bool(missing.any()):
            fleet.cancel(torch.nonzero(missing).flatten())
        return Heard(_who(came, self.count), _rows(came, self.count), missing, waited)

    def metrics(self, s: State, heard: Heard) -> dict[str, int]:
        """Of a round."""
        return {"stragglers": int(heard.late.sum()), "waited": int(heard.waited), "jobs_done": s.done}


@dataclass(frozen=True)
class Bursts:
    """The (B, W, lambda)-bursty straggler model of n workers.

    In each window of W rounds there are at most lambda distinct stragglers, and a worker's straggles inside it lie
    within B consecutive rounds.
    """

    B: int
    W: int
    lam: int
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.B < self.W:
            raise ValueError(
                f"B={self.B} and W={self.W}: a burst lasts at least 1 round and less than its window; take 1 <= B < W"
            )
        if not 0 <= self.lam <= self.n:
            raise ValueError(
                f"lam={self.lam} distinct stragglers cannot be among {self.n} workers; lam must lie in [0, {self.n}]"
            )

    def conforms(self, past: tuple[Tensor, ...], late: Tensor) -> bool:
        """Whether a round fits to those before it.

        Args:
            past: [n] bool each, the stragglers of earlier rounds, of which the last W - 1 count.
            late: [n] bool, those of this round.
        """
        window = torch.stack([*past[len(past) - min(self.W - 1, len(past)) :], late])
        too_early = window[: len(window) - self.B].any(0)  # rounds up to B before this one
        return int(window.any(0).sum()) <= self.lam and not bool((too_early & late).any())

    def remember(self, past: tuple[Tensor, ...], late: Tensor) -> tuple[Tensor, ...]:
        """The past of the next round."""
        return (*past, late)[-(self.W - 1) :]


def _who(came: list[Replies], n: int) -> Tensor:
    """[n] bool: whose replies are among these."""
    out = torch.zeros(n, dtype=torch.bool)
    for r in came:
        out[r.ids] = True
    return out


def _rows(came: list[Replies], n: int) -> dict[str, Tensor]:
    """{field: [n, P]} of all replies, zeros where nothing came."""
    out: dict[str, Tensor] = {}
    for r in came:
        for name, rows in r.fields.items():
            if len(r):
                out.setdefault(name, rows.new_zeros(n, *rows.shape[1:]))[r.ids] = rows
    return out
