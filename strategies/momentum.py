"""What FedAvg-M, SCAFFOLD-M and their variance-reduced forms share.

Letters: C clients of a stack, R replies, P parameters, K_i local steps of a client, eta the local step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsim.clients.local_training import LocalRun, LocalTraining
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Replies
from fedsim.strategies.server import Synchronous
from fedsim.strategy import Traits
from fedsim.terms import Terms

NO_LATE = "its momentum compares gradients at the two newest models, and a late reply knows older ones"


@dataclass(frozen=True, kw_only=True)
class Momentum(Synchronous):
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
        if self.gamma is not None and not self.gamma >= 0:
            raise ValueError(
                f"gamma must be 0 or more, or null for the local step size times the local steps; got {self.gamma}"
            )

    def step_size(self, replies: Replies) -> float:
        """gamma, by default server_lr * eta * K with the mean K of the clients that have data: parity with FedAvg."""
        if self.gamma is not None:
            return self.gamma
        steps = self.local.schedule.num_steps(replies.num_examples)
        taken = steps[steps > 0].double()
        return self.server_lr * self.local.lr * (float(taken.mean()) if len(taken) else 1.0)

    def along(self, clients: Cohort, run: LocalRun) -> Terms:
        """[C, P]: Delta_i / (eta * K_i), the mean direction of a client's steps; zero for a client that took none.

        Entries of buffers are left as they are: their change is no direction.
        """
        each, n = 1 / (self.local.lr * run.steps.clamp(min=1).double()), clients.task.layout.num_trainable
        if n == clients.task.layout.size:
            return run.delta * each
        delta = run.delta.dense()
        delta[:, :n] *= each.to(delta)[:, None]
        return Terms.of(delta)


def twice(local: LocalTraining) -> Cost:
    """The cost of a job that takes two gradients of every minibatch: the clock counts gradients, not steps."""
    return Cost(steps=lambda num_examples: 2 * local.schedule.num_steps(num_examples))
