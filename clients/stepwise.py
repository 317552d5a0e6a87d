"""Local runs step by step: any rule of the optimizer core, any direction, any engine.

Letters: C clients, k of them still stepping, P entries, n of them trainable, S entries of an optimizer's state; y the
local model, g the gradient of a minibatch at y, u the direction of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from fedsim.clients.direction import Direction
from fedsim.cohort import Cohort
from fedsim.optim import Optimizer, OptState
from fedsim.optim.needs import supply
from fedsim.streams import Streams
from fedsim.task import Batches, Schedule, Session, Task

MEMORY = "optimizer/"  # names of the optimizer's rows in a client's memory


def steps_of(task: Task, batches: Batches, y: Tensor) -> Iterator[tuple[int, int, Session, Any]]:
    """(step, k, the task bound to the first k rows of y [C, P], their batch) for each step of a stack."""
    session, bound = None, -1
    for step in range(len(batches)):
        k = batches.active(step)
        if session is None or k != bound:
            session, bound = task.session(y[:k]), k
        yield step, k, session, batches[step]


@dataclass(frozen=True)
class Stepwise:
    """One run of a stack.

    Args:
        optimizer, schedule, rounds: see `LocalTraining`.
        cohort: the clients.
        batches: theirs.
        u: direction of a step.
        fixed: [S], a state of the optimizer that every step begins with; None if each goes on from the last one's.
    """

    optimizer: Optimizer
    schedule: Schedule
    rounds: int
    cohort: Cohort
    batches: Batches
    u: Direction
    fixed: Tensor | None = None

    def run(
        self, x: Tensor, *, mean_grad: bool, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(y [C, P] in a scratch buffer, sum of losses [C], mean of raw gradients [C, P], change of state [C, S]).

        Args:
            x: where clients start, [P] or [C, P].
            mean_grad: whether the mean is wanted.
            state: [S] or [C, S], the optimizer's state that came with the model.
        """
        y = self.cohort.scratch("y", x).copy_(x)  # one place from round to round, as graphs of steps need it
        total = torch.zeros_like(y) if mean_grad else None
        state_change = None
        if self.optimizer.is_plain_sgd and isinstance(self.optimizer.lr, float | int):
            losses = self._plain(y, total, float(self.optimizer.lr))
        else:
            doubt = torch.zeros((), dtype=y.dtype, device=y.device)
            losses, after = self._by_rule(y, total, state, doubt)
            if not isfinite(float(doubt)):  # the one wait of a run; what was not finite is left out in a second one
                y.copy_(x)
                total = total if total is None else total.zero_()
                losses, after = self._by_rule(y, total, state, None)
            self._remember(after)
            state_change = None if state is None else state - after.pack(state)
        if total is not None:
            total /= self.batches.num_steps.clamp(min=1)[:, None]
        return y, losses, total, state_change

    def _plain(self, y: Tensor, total: Tensor | None, lr: float) -> Tensor:
        """y <- y - lr * u, inside the backward products where nobody wants the gradients and the task's engine can."""
        cohort, batches, u, n = self.cohort, self.batches, self.u, self.cohort.task.layout.num_trainable
        losses = torch.zeros(len(cohort), device=y.device)
        for step, k, session, batch in steps_of(cohort.task, batches, y):
            factor, loss = self._lr_factor(step, k), None
            if total is None and u.other is None and isinstance(factor, float):
                loss = session.sgd_step_(batch, lr * factor, scale=u.scale, shift=u.beside(y[:k], self._spare))
            if loss is None:
                g, loss = session.gradient(batch, cohort.scratch("gradient", y)[:k])
                if total is not None:
                    total[:k] += g
                rate = factor.to(y)[:, None] if isinstance(factor, Tensor) else factor
                y[:k, :n].sub_(self._along_(y[:k], g, batch)[:, :n].mul_(lr * rate))
            losses[:k].add_(loss)
        return losses

    def _by_rule(
        self, y: Tensor, total: Tensor | None, sent: Tensor | None, doubt: Tensor | None
    ) -> tuple[Tensor, OptState]:
        """Any rule of the core, with the raw gradients added up in `total` if wanted; (losses [C], state after it).

        Args:
            y: [C, P] where clients start, and where they end.
            total: [C, P] of zeros, or None.
            sent: see `run`.
            doubt: see `Optimizer.step_`.
        """
        cohort, batches, n = self.cohort, self.batches, self.cohort.task.layout.num_trainable
        gradient = cohort.scratch("gradient", y)
        losses = torch.zeros(len(cohort), device=y.device)
        state, streams = self._recall(y[:, :n], sent), cohort.streams
        for step, k, session, batch in steps_of(cohort.task, batches, y):
            if k < len(streams.clients):
                streams = streams.rows(slice(k))
            if self.fixed is not None:
                state.unpack_(self.fixed)
            g, loss, aux = self._gradient(session, y[:k], batch, state, gradient[:k], streams)
            if total is not None:
                total[:k] += g
            g, factor = self._along_(y[:k], g, batch), self._lr_factor(step, k)
            self.optimizer.step_(y[:k, :n], g[:, :n], state, lr_scale=factor, aux=aux, streams=streams, doubt=doubt)
            losses[:k] += loss.to(losses.dtype)
        final = self.optimizer.final(y[:, :n], state)
        if final.data_ptr() != y.data_ptr():
            y[:, :n] = final
        return losses, state

    def _gradient(
        self, session: Session, y: Tensor, batch: Any, state: OptState, out: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(g [k, P], loss [k], what else the rule needs) at y [k, P], whose buffers follow the training pass."""
        optimizer, task = self.optimizer, self.cohort.task
        n = task.layout.num_trainable
        if not optimizer.needs - {"grad"} or optimizer.wanted(state, len(y)) == {"grad"}:
            return *session.gradient(batch, out), {}
        # before the training pass, which may move the buffers
        needed = task.oracle(batch, y[:, n:])
        g, aux = supply(optimizer, y[:, :n], state, needed, streams=streams)
        if g is None:
            return *session.gradient(batch, out), aux
        assert needed.loss is not None
        out[:, :n], out[:, n:] = g, 0
        return out, needed.loss, aux

    def _along_(self, y: Tensor, g: Tensor, batch: Any) -> Tensor:
        """u [k, P] in the place of the gradients g [k, P] at the local models y [k, P]."""
        u, cohort = self.u, self.cohort
        if u.scale != 1.0:
            g *= u.scale
        if u.other is not None:
            point = cohort.scratch("other", g)[: len(g)].copy_(u.other)
            there, _ = cohort.task.session(point).gradient(batch, cohort.scratch("other_gradient", g)[: len(g)])
            g += there.mul_(u.other_scale)
        beside = u.beside(y, self._spare)
        return g if beside is None else g.add_(beside)

    def _spare(self, like: Tensor) -> Tensor:
        """[k, P] to write what a step takes beside gradients."""
        return self.cohort.scratch("beside", like)[: len(like)]

    def _lr_factor(self, step: int, k: int) -> float | Tensor:
        """The schedule's factor: one number, or [k] where clients were sent their work in different rounds."""
        schedule = self.optimizer.schedule
        if schedule is None:
            return 1.0
        keys = self._begun[:k] if schedule.unit == "steps" else [(r, 0) for r, _ in self._begun[:k]]
        factors = {
            key: schedule.at_step(rounds=key[0], steps=key[1] + step, fraction=key[0] / self.rounds)
            for key in dict.fromkeys(keys)
        }
        if len(factors) == 1:
            return next(iter(factors.values()))
        return torch.tensor([factors[key] for key in keys])

    @cached_property
    def _begun(self) -> list[tuple[int, int]]:
        """[C] (round in which a client was given its work, steps that it had taken in earlier jobs)."""
        rounds, each = self.cohort.rounds.tolist(), self.schedule.num_steps(self.cohort.num_examples).tolist()
        jobs = self.cohort.streams.jobs.tolist()
        return [(round, job * steps) for round, job, steps in zip(rounds, jobs, each, strict=True)]

    def _recall(self, x: Tensor, sent: Tensor | None) -> OptState:
        """Fresh state; with `state_scope: client` what the clients kept, with `server` what was sent."""
        state, memory = self.optimizer.init(x), self.cohort.memory
        if self.optimizer.state_scope == "server":
            assert sent is not None, "the strategy must send LocalTraining.start's state along"
            state.unpack_(sent)
        if self.optimizer.state_scope == "client" and MEMORY + "t" in memory:
            known = memory.read(MEMORY + "t", ()) > 0
            for name, rows in state.to_rows().items():
                stored = memory.read(MEMORY + name, tuple(rows.shape[1:]), rows.dtype)
                mine = known.to(rows.device).view(-1, *[1] * (rows.ndim - 1))
                rows.copy_(torch.where(mine, stored.to(rows), rows))
        return state

    def _remember(self, state: OptState) -> None:
        if bool(state.skipped.any()):
            self.cohort.log(skipped_steps=state.skipped.to(torch.float32))
        if self.optimizer.state_scope == "client":
            for name, rows in state.to_rows().items():
                self.cohort.memory[MEMORY + name] = rows
