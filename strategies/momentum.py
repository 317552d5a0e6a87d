"""What FedAvg-M, SCAFFOLD-M, their variance-reduced forms and FedCM share.

Letters: C clients of a stack, R replies, P parameters, K_i local steps of a client, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.clients.local_training import LocalRun, LocalTraining
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Fleet, Replies
from fedsim.strategies.server import Synchronous
from fedsim.strategy import Traits
from fedsim.terms import Terms

NO_LATE = "its momentum compares gradients at the two newest models, and a late reply knows older ones"


@dataclass(frozen=True, kw_only=True)
class Directed(Synchronous):
    """A server that steps along the mean direction of its clients' local steps."""

    def parity(self, fleet: Fleet, replies: Replies) -> float:
        """server_lr * eta * K with the mean K of the clients that have data: a step as long as FedAvg's."""
        steps = self.local.schedule.num_steps(replies.num_examples)
        taken = steps[steps > 0].double()
        return self.server_lr * self.local.rate_at(fleet.round) * (float(taken.mean()) if len(taken) else 1.0)

    def along(self, clients: Cohort, run: LocalRun) -> Terms:
        """[C, P]: Delta_i / (eta * K_i), the mean direction of a client's steps; zero for a client that took none."""
        rates, steps = self.local.rates(clients), run.steps.clamp(min=1).double()
        eta = rates[0] if len(set(rates)) == 1 else torch.tensor(rates, dtype=torch.float64).to(steps)
        return shrunk(clients, run, eta * steps)


@dataclass(frozen=True, kw_only=True)
class Momentum(Directed):
    """Local steps along a mix of fresh gradients and the server's momentum g; the server steps along the new g.

    Args:
        beta: weight of the fresh gradient, in (0, 1]; small is heavy momentum, 1 is none.
        gamma: the server's step; null is eta * K * server_lr.
        server_lr: scales the default gamma.
    """

    beta: float = 0.1
    gamma: float | None = None
    traits: ClassVar[Traits] = Traits(local_rules="plain_sgd")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta is the weight of the fresh gradient and must lie in (0, 1], got {self.beta}")
        if self.gamma is not None and not 0 <= self.gamma < inf:
            raise ValueError(
                f"gamma must be 0 or more, or null for the local step size times the local steps; got {self.gamma}"
            )

    def step_size(self, fleet: Fleet, replies: Replies) -> float:
        """gamma, by default parity with FedAvg."""
        return self.parity(fleet, replies) if self.gamma is None else self.gamma


def shrunk(clients: Cohort, run: LocalRun, by: Tensor) -> Terms:
    """[C, P]: each client's change divided by a number of its own [C]; of buffers the change, which is no direction."""
    each, n = 1 / by, clients.task.layout.num_trainable
    if n == clients.task.layout.size:
        return run.delta * each
    delta = run.delta.dense()
    delta[:, :n] *= each.to(delta)[:, None]
    return Terms.of(delta)


def twice(local: LocalTraining) -> Cost:
    """The cost of a job that takes two gradients of every minibatch: the clock counts gradients, not steps."""
    return Cost(steps=lambda num_examples: 2 * local.schedule.num_steps(num_examples))
