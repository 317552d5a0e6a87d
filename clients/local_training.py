"""Local training: some steps of the shared optimizer core on every client of a stack.

There are two ways to compute a run, chosen in `LocalTraining.__call__` and nowhere else: in factors, without forming
anybody's weights (`fedsim.engine.low_rank`), or step by step (`stepwise`).

Letters: C clients, P entries, K local steps, S entries of an optimizer's state; x the model a client received, y its
local model, g the gradient of a minibatch at y, u the direction of a step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim.clients.direction import GRADIENT, Direction
from fedsim.clients.stepwise import Stepwise, less_
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Exact
from fedsim.optim import Optimizer, build
from fedsim.strategy import Traits
from fedsim.task import Schedule, Walk, reach
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

    @property
    def _one_rate_a_round(self) -> bool:
        optimizer, schedule = self.optimizer, self.optimizer.schedule
        return isinstance(optimizer.lr, float | int) and (schedule is None or schedule.unit != "steps")

    def rates(self, cohort: Cohort) -> list[float]:
        """The learning rate of each client's run, by the round in which it was given its work."""
        rounds = cohort.rounds.tolist()
        found = {round: self.rate_at(round) for round in set(rounds)}
        return [found[round] for round in rounds]

    def rate_at(self, round: int) -> float:
        """The learning rate of all steps of a round, or of one that a strategy takes itself."""
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
        if bears in ("plain_sgd", "scheduled_sgd") and not plain:
            raise ValueError(
                "this strategy corrects the direction of every local step, and local.optimizer would clip, decay or "
                "precondition the correction too; use local.optimizer {name: sgd} without momentum, weight_decay and "
                "clip"
            )
        if bears == "plain_sgd":
            _ = self.lr
        if bears in ("scheduled_sgd", "momentum_sgd") and not self._one_rate_a_round:
            raise ValueError(
                "this strategy divides by the local learning rate of a round: give one number, and a schedule of unit "
                "rounds or fraction if any"
            )
        if bears == "momentum_sgd" and (self.optimizer.momentum is None or self.optimizer.state_scope != "round"):
            raise ValueError(
                "this strategy knows how far plain SGD and SGD with momentum go, and no other rule; use "
                "local.optimizer {name: sgd}, with momentum if you like, and without nesterov, dampening, ema, "
                "weight_decay, clip and state_scope"
            )
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

    def only(self, names: Collection[str]) -> LocalTraining:
        """The same, in which only these tensors move: the others' learning rates are zero.

        Raises:
            ValueError: for an optimizer that has one rate for all tensors.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, Optimizer):
            raise ValueError("this strategy trains parts of the model in turn; take a rule of `fedsim list optimizers`")
        # written as patterns, for a tensor may be called like a role
        fixed = {f"[{name[0]}]{name[1:]}": 0.0 for name in optimizer.layout.names if name not in names}
        multipliers = fixed | (optimizer.spec.get("lr_mult") or {})  # the first that matches counts
        return replace(self, optimizer=build({**optimizer.spec, "lr_mult": multipliers}, optimizer.layout))

    def aside(self, epochs: int) -> LocalTraining:
        """The same for so many epochs, by an optimizer that begins anew: what is learned so leaves no trace."""
        optimizer, schedule = self.optimizer, replace(self.schedule, epochs=epochs, steps=None)
        if optimizer.state_scope != "round":
            optimizer = build({**optimizer.spec, "state_scope": "round"}, optimizer.layout)
        return replace(self, optimizer=optimizer, schedule=schedule)

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
        # the model follows from the gradients' sum, or from that of their differences to those where the run starts;
        # with a pull it is not the sum that their mean comes from
        differs = u.other is x and u.other_scale == -u.scale and not mean_grad
        known = self.constant_rate and (u.other is None or differs) and not (u.pull and (mean_grad or differs))
        walk = Walk(self.lr, u.scale, u.pull, u.about(x), differs) if known else None
        factored = None if walk is None else task.factored_run(x, batches, walk)
        if walk is not None and factored is not None:
            sums, losses = Terms.of(factored[0]), factored[1]
            mean = (sums * (1 / steps.clamp(min=1).double())).dense() if mean_grad else None
            moved = sums * walk.lr if mean is None else Terms.of(mean) * (walk.lr * steps.double())
            far = Terms(walk.shift) * (walk.lr * reach(steps.double(), walk.lr * walk.pull))
            run = LocalRun(moved * walk.scale + far, steps, all_stepped, mean)
        else:
            taken = Stepwise(self.optimizer, self.schedule, self.rounds, cohort, batches, u, fixed)
            y, losses, mean, state_change = taken.run(x, mean_grad=mean_grad, state=state)
            run = LocalRun(Terms.of(less_(y, x)), steps, all_stepped, mean, state_change)
        cohort.log(train_loss=losses / steps.clamp(min=1))
        return run


def apart(cohort: Cohort) -> Cohort:
    """The same clients with random numbers that no job of the run draws."""
    return replace(cohort, streams=replace(cohort.streams, seed=~cohort.streams.seed))
