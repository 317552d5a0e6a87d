"""What Mime and MimeLite share: an optimizer whose state is the server's, and fixed while clients step by it.

Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich, Suresh. Mime: Mimicking Centralized Stochastic Algorithms in Federated
Learning. arXiv:2008.03606. A base algorithm is two functions, the step U and the state's update V:

    y <- y - eta * U(g, s)        s <- V(g, s)

Here it is any rule of the optimizer core that looks at a gradient alone: U is the step that the rule takes next from
s, after which the client forgets what the step made of s, and V is what a step at the server's model leaves in s. So
one local step a round is that rule at the server, as the tests check. Heavy ball as in the paper, U(g, m) = V(g, m) =
(1 - beta) * g + beta * m, is `{name: sgd, momentum: beta, ema: true}`.

Departure: as in the authors' code, U sees the state's update by its own gradient (the second moment of Adam holds g^2);
the paper writes Adam with the server's second moment alone.

Letters: S clients in a round, P parameters; x the server's model, y a local one, s the server's state, c the mean of
the clients' full gradients at x, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.fleet import Cost, Fleet
from fedsim.optim import Optimizer, OptState, Rule
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.strategies.server import ServerState, Synchronous
from fedsim.strategy import Traits


@dataclass(frozen=True, kw_only=True)
class State(ServerState):
    """base: s, of one client; None for plain SGD, which has none. c: [P], the last mean of full gradients."""

    base: OptState | None
    c: Tensor

    @property
    def sent(self) -> Tensor | None:
        """[S], s as it travels: its numbers for each parameter, and its counter of steps."""
        return None if self.base is None else self.base.pack(self.x)[0]


@dataclass(frozen=True, kw_only=True)
class Mimicking(Synchronous):
    """A synchronous server whose clients step by an optimizer that only the server's full gradients change.

    Args:
        local: local.optimizer is the base algorithm (U, V), with eta as its learning rate.
    """

    traits: ClassVar[Traits] = Traits(
        no_late="the optimizer's state and the mean gradient that local steps follow are those of one round"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_base(self.local.optimizer)

    def init(self, x0: Tensor) -> State:
        rule = self.local.optimizer
        base = None if rule.is_plain_sgd else rule.init(x0[None, : rule.layout.size])
        return State(x0, self.optimizer_state(x0), base=base, c=torch.zeros_like(x0))

    def learned(self, s: State, fleet: Fleet, x: Tensor, c: Tensor) -> State:
        """The state with s <- V(c, s), c [P] the mean gradient at x [P]."""
        if s.base is None:
            return replace(s, c=c)
        rule, base = self.local.optimizer, s.base.gather([0])
        n, factor = rule.layout.size, self.local.factor_at(fleet.round)
        rule.step_(x[None, :n].clone(), c[None, :n], base, lr_scale=factor)
        return replace(s, base=base, c=c)


def full_pass(local: LocalTraining) -> Cost:
    """The cost of a job that takes the gradient of all data once: as many steps as an epoch."""
    return Cost(steps=local.schedule.steps_per_epoch)


def check_base(rule: Optimizer) -> None:
    """Refuse a local optimizer whose state the server cannot keep.

    Raises:
        ValueError: if it is no rule of the core, lives at the clients, trains elsewhere, or needs more than a gradient.
    """
    why = None
    if isinstance(rule, ForeignOptimizer):
        raise ValueError(
            "local.optimizer: the server keeps the optimizer's state, and one given by import path keeps its own; take "
            "a rule of `fedsim list optimizers`"
        )
    if rule.state_scope != "round":
        why = f"state_scope: {rule.state_scope} keeps the state elsewhere; leave it out"
    elif rule.settings.average is not None:
        why = "average is made of the steps that one client takes; leave it out"
    for group in rule.recipe.groups:
        if type(group.rule).final is not Rule.final:
            why = f"{group.label} sends another point than the one it steps from; take another rule"
        elif group.rule.inputs or rule.needs != {"grad"}:
            why = f"{group.label} needs more than a gradient ({', '.join((*rule.needs, *group.rule.inputs))})"
    if why is not None:
        raise ValueError(f"local.optimizer: its state is the server's in this strategy, fixed during a round; {why}")
