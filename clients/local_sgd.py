"""Local training: some steps of the shared optimizer core on every client of a stack.

Letters: C clients, k of them still stepping, P entries, K local steps; x the model a client received, y its local
model, g the gradient of a minibatch at y, u the direction of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.clients.corrected import change_along, corrected_run
from fedsim.clients.direction import GRADIENT, Affine
from fedsim.cohort import Cohort
from fedsim.fleet import Cost
from fedsim.optim import Optimizer, OptState
from fedsim.optim.needs import supply
from fedsim.streams import Streams
from fedsim.task import Batches, Factored, Schedule

Reply = Mapping[str, Tensor | Factored]
"""What a client half returns: {field: [C, ...] or factors of it}."""

MEMORY = "optimizer/"  # names of the optimizer's rows in a client's memory


@dataclass(frozen=True)
class LocalResult:
    """What local training gave.

    Args:
        update: the change of each client in its cheapest form, to be sent as it is: a tensor [C, P], or factors.
        steps: [C] local steps taken.
        mean_grad: [C, P] mean of the raw gradients g, or None if it was not asked for.
        state: [C, S], the optimizer's state received minus the local one, or None if none was sent.
    """

    update: Tensor | Factored
    steps: Tensor
    mean_grad: Tensor | None
    state: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """[C, P], the model received minus the local model: a pseudo-gradient."""
        return self.update if isinstance(self.update, Tensor) else self.update.dense()

    def where_stepped(self, new: Tensor, old: Tensor) -> Tensor:
        """[C, P]: new for clients that took a step, old for those that have no data."""
        return new if bool((self.steps > 0).all()) else torch.where(self.steps[:, None] > 0, new, old)


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """K steps of an optimizer on every client.

    Args:
        optimizer: a rule of the shared core.
        schedule: epochs or steps, batch size, order.
        rounds: length of the run, for learning rates that follow the fraction of it that is done.
    """

    optimizer: Optimizer
    schedule: Schedule
    rounds: int = 1

    @property
    def num_trainable(self) -> int:
        """Entries of a model that are parameters; those behind them are buffers."""
        return self.optimizer.layout.size

    @property
    def cost(self) -> Cost:
        """Local steps of a job, from the clients' sample counts."""
        return Cost(steps=self.schedule.num_steps)

    @property
    def lr(self) -> float:
        """The learning rate, for rules that divide by it.

        Raises:
            ValueError: if it is not one number for all clients and rounds.
        """
        if not isinstance(self.optimizer.lr, float | int) or self.optimizer.schedule is not None:
            raise ValueError("this strategy divides by the local learning rate: give one number and no schedule")
        return float(self.optimizer.lr)

    def start(self, x: Tensor) -> Tensor | None:
        """[S], the state that the server sends along with the model x [P] at first; None unless it is to send one."""
        if self.optimizer.state_scope != "server" or self.optimizer.is_plain_sgd:
            return None
        return self.optimizer.init(x[None, : self.optimizer.layout.size]).pack(x)[0]

    def __call__(
        self,
        cohort: Cohort,
        x: Tensor,
        direction: Affine = GRADIENT,
        *,
        mean_grad: bool = False,
        state: Tensor | None = None,
    ) -> LocalResult:
        """Train from x ([P], or [C, P] where clients start from different models) along `direction`.

        Args:
            cohort: the clients.
            x: the model they received.
            direction: of a step.
            mean_grad: also return the mean of the raw gradients.
            state: [S] or [C, S], the optimizer's state that came with the model.
        """
        batches = cohort.task.batches(cohort.ids, cohort.streams, self.schedule)
        steps = batches.num_steps
        if (direction is GRADIENT or mean_grad and direction.other is None) and self._constant_rate():
            whole = cohort.task.plain_run(x, batches, self.lr, direction.scale, direction.terms)
            if whole is not None:
                sums, losses = whole
                cohort.log(train_loss=losses / steps.clamp(min=1))
                if not mean_grad:
                    return LocalResult(sums * self.lr, steps, None)
                mean = (sums * (1 / steps.clamp(min=1).double())).dense()
                return LocalResult(change_along(direction, mean, self.lr, steps), steps, mean)
        if mean_grad and direction.other is None and self._constant_rate() and not cohort.task.layout.num_buffers:
            mean, losses = corrected_run(cohort, x, batches, self.lr, direction)
            cohort.log(train_loss=losses / steps.clamp(min=1))
            return LocalResult(change_along(direction, mean, self.lr, steps), steps, mean)
        y = cohort.buffer("y", x).copy_(x)
        total = torch.zeros_like(y) if mean_grad else None
        state_change = None
        if self.optimizer.is_plain_sgd and isinstance(self.optimizer.lr, float | int):
            loss = self._plain(cohort, y, batches, direction, total)
        else:
            loss, state_change = self._stepwise(cohort, y, batches, direction, total, state)
        cohort.log(train_loss=loss / steps.clamp(min=1))
        if total is not None:
            total /= steps.clamp(min=1)[:, None]
        return LocalResult(torch.sub(x, y, out=y), steps, total, state_change)

    def _constant_rate(self) -> bool:
        """Whether every step is x <- x - lr * g with one and the same number lr."""
        optimizer = self.optimizer
        return optimizer.is_plain_sgd and isinstance(optimizer.lr, float | int) and optimizer.schedule is None

    def _plain(self, cohort: Cohort, y: Tensor, batches: Batches, u: Affine, total: Tensor | None) -> Tensor:
        """y <- y - lr * u, inside the backward products where the task's engine can: then no gradient is stored."""
        n, lr = cohort.task.layout.num_trainable, float(self.optimizer.lr)  # type: ignore[arg-type]
        losses = torch.zeros(len(cohort), device=y.device)
        gradient = None
        session, k = None, -1
        for step in range(len(batches)):
            if batches.active(step) != k:
                k = batches.active(step)
                session = cohort.task.session(y[:k])
                grad_sum = None if total is None else total[:k]
            assert session is not None
            batch = batches[step]
            factor = self._lr_factor(cohort, step, k)
            loss = None
            if u.other is None and isinstance(factor, float):
                loss = session.sgd_step_(batch, lr * factor, scale=u.scale, shift=u.rows(k), grad_sum=grad_sum)
            if loss is None:
                gradient = cohort.buffer("gradient", y) if gradient is None else gradient
                g, loss = session.gradient(batch, gradient[:k])
                if grad_sum is not None:
                    grad_sum += g
                rate = factor.to(y)[:, None] if isinstance(factor, Tensor) else factor
                y[:k, :n].sub_(lr * rate * self._direction(cohort, u, g, batch)[:, :n])
            losses[:k].add_(loss)
        return losses

    def _stepwise(
        self, cohort: Cohort, y: Tensor, batches: Batches, u: Affine, total: Tensor | None, sent: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Any rule of the core, with the raw gradients added up in `total` if wanted; (losses [C], change of state)."""
        n = cohort.task.layout.num_trainable
        gradient = cohort.buffer("gradient", y)
        losses = torch.zeros(len(cohort), device=y.device)
        state = self._recall(cohort, y[:, :n], sent)
        for step in range(len(batches)):
            k = batches.active(step)
            batch = batches[step]
            point = self.optimizer.eval_point(y[:k, :n], state)
            at = y[:k] if point.data_ptr() == y.data_ptr() else torch.cat([point, y[:k, n:]], dim=1)
            streams = cohort.streams.rows(slice(k))
            g, loss, aux = self._gradient(cohort, at, batch, state, gradient[:k], streams)
            if at.data_ptr() != y.data_ptr():
                y[:k, n:] = at[:, n:]  # the training pass moved the copy's buffers
            if total is not None:
                total[:k] += g
            g = self._direction(cohort, u, g, batch)
            factor = self._lr_factor(cohort, step, k)
            self.optimizer.step_(y[:k, :n], g[:, :n], state, lr_scale=factor, aux=aux, streams=streams)
            losses[:k] += loss.to(losses.dtype)
        final = self.optimizer.final(y[:, :n], state)
        if final.data_ptr() != y.data_ptr():
            y[:, :n] = final
        self._remember(cohort, state)
        if bool(state.skipped.any()):
            cohort.log(skipped_steps=state.skipped.to(torch.float32))
        return losses, None if sent is None else sent - state.pack(sent)

    def _gradient(
        self, cohort: Cohort, at: Tensor, batch: Any, state: OptState, out: Tensor, streams: Streams
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(g [k, P], loss [k], what else the rule needs) at `at` [k, P]; buffers of `at` follow the training pass."""
        optimizer, n = self.optimizer, cohort.task.layout.num_trainable
        if not optimizer.needs - {"grad"} or optimizer.wanted(state, len(at)) == {"grad"}:
            return *cohort.task.session(at).gradient(batch, out), {}
        # before the training pass, which may move the buffers
        needed = cohort.task.oracle(batch, at[:, n:])
        g, aux = supply(optimizer, at[:, :n], state, needed, streams=streams)
        if g is None:
            return *cohort.task.session(at).gradient(batch, out), aux
        assert needed.loss is not None
        out[:, :n], out[:, n:] = g, 0
        return out, needed.loss, aux

    def _direction(self, cohort: Cohort, u: Affine, g: Tensor, batch: object) -> Tensor:
        """u [k, P] from the gradients g [k, P]."""
        out = g if u.scale == 1.0 else g * u.scale
        if u.other is not None:
            k = len(g)
            point = cohort.buffer("other", g)[:k].copy_(u.other)
            there, _ = cohort.task.session(point).gradient(batch, cohort.buffer("other_gradient", g)[:k])
            out = out + u.other_scale * there
        shift = u.rows(len(g))
        return out if shift is None else out + shift

    def _lr_factor(self, cohort: Cohort, step: int, k: int) -> float | Tensor:
        """The schedule's factor: one number, or [k] where clients were sent their work in different rounds."""
        schedule = self.optimizer.schedule
        if schedule is None:
            return 1.0
        rounds = cohort.rounds[:k].tolist()
        done = [job * int(s) for job, s in zip(cohort.streams.jobs[:k].tolist(), self._steps(cohort, k), strict=True)]
        keys = list(zip(rounds, done, strict=True)) if schedule.unit == "steps" else [(r, 0) for r in rounds]
        factors = {
            key: schedule.at_step(rounds=key[0], steps=key[1] + step, fraction=key[0] / self.rounds)
            for key in dict.fromkeys(keys)
        }
        if len(factors) == 1:
            return next(iter(factors.values()))
        return torch.tensor([factors[key] for key in keys])

    def _steps(self, cohort: Cohort, k: int) -> list[int]:
        return self.schedule.num_steps(cohort.num_examples[:k]).tolist()

    def _recall(self, cohort: Cohort, x: Tensor, sent: Tensor | None) -> OptState:
        """Fresh state; with `state_scope: client` what the clients kept, with `server` what was sent."""
        state = self.optimizer.init(x)
        if self.optimizer.state_scope == "server":
            assert sent is not None, "the strategy must send LocalSGD.start's state along"
            state.unpack_(sent)
        if self.optimizer.state_scope == "client" and MEMORY + "t" in cohort.memory:
            known = cohort.memory.read(MEMORY + "t", ()).cpu() > 0
            for name, rows in state.to_rows().items():
                stored = cohort.memory.read(MEMORY + name, tuple(rows.shape[1:]), rows.dtype)
                rows[known.to(rows.device)] = stored.to(rows)[known.to(rows.device)]
        return state

    def _remember(self, cohort: Cohort, state: OptState) -> None:
        if self.optimizer.state_scope == "client":
            for name, rows in state.to_rows().items():
                cohort.memory[MEMORY + name] = rows
