"""Local training: some steps of the shared optimizer core on every client of a stack.

Letters: C clients, P entries, K local steps; y the local model, x the model a client received, g its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.fleet import Cost
from fedsim.optim import Optimizer
from fedsim.task import Batches, Schedule

Direction = Callable[[Tensor], Tensor]
"""g [k, P] -> u [k, P], for the first k clients of the stack, which are those that still step."""


@dataclass(frozen=True)
class LocalResult:
    """What local training gave.

    Args:
        delta: [C, P], the model received minus the local model: a pseudo-gradient.
        steps: [C] local steps taken.
        mean_grad: [C, P] mean of the raw gradients used, or None if it was not asked for.
    """

    delta: Tensor
    steps: Tensor
    mean_grad: Tensor | None


@dataclass(frozen=True, kw_only=True)
class LocalSGD:
    """K steps y <- y - lr * u(g) on every client.

    Args:
        optimizer: a rule of the shared core.
        schedule: epochs or steps, batch size, order.
    """

    optimizer: Optimizer
    schedule: Schedule

    @property
    def cost(self) -> Cost:
        """Local steps of a job, from the clients' sample counts."""
        return Cost(steps=self.schedule.num_steps)

    def __call__(
        self, cohort: Cohort, x: Tensor, direction: Direction | None = None, *, mean_grad: bool = False
    ) -> LocalResult:
        """Train from x ([P], or [C, P] where clients start from different models)."""
        batches = cohort.task.batches(cohort, self.schedule)
        y = cohort.buffer("y", x).copy_(x)
        total = torch.zeros_like(y) if mean_grad else None
        if direction is None and total is None and self.optimizer.is_plain_sgd:
            loss = self._fused(cohort, y, batches)
        else:
            loss = self._stepwise(cohort, y, batches, direction, total)
        steps = batches.num_steps
        cohort.log(train_loss=loss / steps.clamp(min=1))
        if total is not None:
            total /= steps.clamp(min=1)[:, None]
        return LocalResult(torch.sub(x, y, out=y), steps, total)

    def _fused(self, cohort: Cohort, y: Tensor, batches: Batches) -> Tensor:
        """Plain SGD, inside the backward products where the task's engine can: no gradient is ever stored."""
        lr = self.optimizer.lr
        total = torch.zeros(len(cohort), device=y.device)
        gradient = None
        for k in range(len(batches)):
            rows = slice(batches.active(k))
            batch = batches[k]
            loss = cohort.task.sgd_step_(y[rows], batch, lr)
            if loss is None:
                gradient = cohort.buffer("gradient", y) if gradient is None else gradient
                g, loss = cohort.task.field(y[rows], batch, gradient[rows])
                n = cohort.task.layout.num_trainable
                y[rows, :n].add_(g[:, :n], alpha=-lr)
            total[rows] += loss.to(total.dtype)
        return total

    def _stepwise(
        self, cohort: Cohort, y: Tensor, batches: Batches, direction: Direction | None, total: Tensor | None
    ) -> Tensor:
        """Any rule of the core, with the raw gradients added up in `total` if wanted."""
        n = cohort.task.layout.num_trainable
        gradient = cohort.buffer("gradient", y)
        state = self.optimizer.init(y[:, :n])
        loss_sum = torch.zeros(len(cohort), device=y.device)
        for k in range(len(batches)):
            rows = slice(batches.active(k))
            g, loss = cohort.task.field(y[rows], batches[k], gradient[rows])
            if total is not None:
                total[rows] += g
            u = g if direction is None else direction(g)
            self.optimizer.step_(y[rows, :n], u[:, :n], state, streams=cohort.streams.rows(rows))
            loss_sum[rows] += loss.to(loss_sum.dtype)
        return loss_sum
