"""Local training: some steps of the shared optimizer core on every client of a stack.

There are three ways to compute a run, chosen in `LocalTraining.__call__` and nowhere else: in factors, without forming
anybody's weights (`fedsim.engine.low_rank`); by the sum of its gradients (`corrected`); step by step (`stepwise`).

Letters: C clients, P entries, K local steps, S entries of an optimizer's state; x the model a client received, y its
local model, g the gradient of a minibatch at y, u the direction of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.clients.corrected import corrected_run
from fedsim.clients.direction import GRADIENT, Direction
from fedsim.clients.stepwise import Stepwise
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Exact
from fedsim.optim import Optimizer
from fedsim.strategy import Traits
from fedsim.task import Schedule
from fedsim.terms import Terms

Reply = Mapping[str, Tensor | Terms | Exact]
"""What a client half returns: {field: [C, ...] or terms of it}."""


@dataclass(frozen=True)
class LocalRun:
    """What local training gave; nothing of it lies in a buffer that is used again.

    Args:
        delta: [C, P] as terms, the model received minus the local model: a pseudo-gradient.
        steps: [C] local steps taken, on the device.
        all_stepped: whether every client took one.
        mean_grad: [C, P] mean of the raw gradients g, or None if it was not asked for.
        state: [C, S], the optimizer's state received minus the local one, or None if none was sent.
    """

    delta: Terms
    steps: Tensor
    all_stepped: bool
    mean_grad: Tensor | None = None
    state: Tensor | None = None

    def where_stepped(self, new: Tensor, old: Tensor) -> Tensor:
        """[C, P]: new for clients that took a step, old for those that have no data."""
        return new if self.all_stepped else torch.where(self.steps[:, None] > 0, new, old)


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
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

    @property
    def constant_rate(self) -> bool:
        """Whether every step is x <- x - lr * u with one and the same number lr."""
        optimizer = self.optimizer
        return optimizer.is_plain_sgd and isinstance(optimizer.lr, float | int) and optimizer.schedule is None

    def rate_at(self, round: int) -> float:
        """The learning rate of a step that a strategy takes itself in a round."""
        assert isinstance(self.optimizer.lr, float | int), "checked by `check`"
        return self.optimizer.lr * self.factor_at(round)

    def factor_at(self, round: int) -> float:
        """What the schedule makes of the learning rate in a round, for one step a round."""
        schedule = self.optimizer.schedule
        fraction = round / self.rounds
        return 1.0 if schedule is None else schedule.at_step(rounds=round, steps=round, fraction=fraction)

    def check(self, traits: Traits) -> None:
        """Refuse a rule that a strategy does not bear.

        Raises:
            ValueError: if it would act on a corrected direction or in a step of the strategy's own, or has no one rate.
        """
        plain, bears = self.optimizer.is_plain_sgd, traits.local_rules
        if bears == "plain_sgd" and not plain:
            raise ValueError(
                "this strategy corrects the direction of every local step, and local.optimizer would clip, decay or "
                "precondition the correction too; use local.optimizer {name: sgd} without momentum, weight_decay and "
                "clip"
            )
        if bears == "plain_sgd":
            _ = self.lr
        if bears == "rate" and not (plain and isinstance(self.optimizer.lr, float | int)):
            raise ValueError(
                "this strategy takes its own step: local.optimizer gives it a learning rate and a schedule only; use "
                "{name: sgd} without momentum, weight_decay and clip"
            )
        if self.optimizer.state_scope == "server" and not traits.averages_state:
            raise ValueError(
                "local.optimizer.state_scope: server is not for this strategy, which averages no states; take round or "
                "client, or fedavg"
            )

    def start(self, x: Tensor) -> Tensor | None:
        """[S], the state that the server sends along with the model x [P] at first; None unless it is to send one."""
        if self.optimizer.state_scope != "server" or self.optimizer.is_plain_sgd:
            return None
        return self.optimizer.init(x[None, : self.optimizer.layout.size]).pack(x)[0]

    def __call__(
        self,
        cohort: Cohort,
        x: Tensor,
        direction: Terms = GRADIENT,
        *,
        mean_grad: bool = False,
        state: Tensor | None = None,
        fixed: Tensor | None = None,
    ) -> LocalRun:
        """Train from x ([P], or [C, P] where clients start from different models) along `direction`.

        Args:
            cohort: the clients.
            x: the model they received.
            direction: of a step.
            mean_grad: also return the mean of the raw gradients.
            state: [S] or [C, S], the optimizer's state that came with the model.
            fixed: [S], a state that every step begins with, so that what steps make of it is forgotten.
        """
        task, u = cohort.task, Direction.of(direction)
        batches = task.batches(cohort.ids, cohort.streams, self.schedule)
        steps, all_stepped = batches.num_steps, len(batches) > 0 and batches.active(0) == len(cohort)
        known = self.constant_rate and u.other is None  # the model follows from the gradients' sum
        # so it does from the sum of their differences to those where the run starts
        differs = self.constant_rate and u.other is x and u.other_scale == -u.scale and not mean_grad
        run_at_once = known or differs
        factored = task.factored_run(x, batches, self.lr, u.scale, u.terms, differs) if run_at_once else None
        if factored is not None:
            sums, losses = Terms.of(factored[0]), factored[1]
            mean = (sums * (1 / steps.clamp(min=1).double())).dense() if mean_grad else None
            moved = sums * self.lr if mean is None else Terms.of(mean) * (self.lr * steps.double())
            run = LocalRun(_change(moved, u, self.lr, steps), steps, all_stepped, mean)
        elif known and mean_grad and not task.layout.num_buffers:
            mean, losses = corrected_run(cohort, x, batches, self.lr, u)
            moved = Terms.of(mean) * (self.lr * steps.double())
            run = LocalRun(_change(moved, u, self.lr, steps), steps, all_stepped, mean)
        else:
            taken = Stepwise(self.optimizer, self.schedule, self.rounds, cohort, batches, u, fixed)
            y, losses, mean, state_change = taken.run(x, mean_grad=mean_grad, state=state)
            run = LocalRun(Terms.of(x - y), steps, all_stepped, mean, state_change)
        cohort.log(train_loss=losses / steps.clamp(min=1))
        return run


def _change(moved: Terms, u: Direction, lr: float, steps: Tensor) -> Terms:
    """x - y of each client [C, P] after `steps` [C] along u, from lr times the sum of its raw gradients."""
    return moved * u.scale + Terms(u.terms) * (lr * steps.double())
