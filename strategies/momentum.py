"""What FedAvg-M, SCAFFOLD-M and their variance-reduced forms share.

Letters: C clients of a stack, R replies, P parameters, K_i local steps of a client, eta the local step.
"""

from __future__ import annotations

from fedsim.clients.local_training import LocalRun, LocalTraining
from fedsim.cohort import Cohort
from fedsim.fleet import Cost, Replies
from fedsim.terms import Terms


def along(clients: Cohort, run: LocalRun, lr: float) -> Terms:
    """[C, P]: Delta_i / (eta * K_i), the mean direction of a client's steps; zero for a client that took none.

    Entries of buffers are left as they are: their change is no direction.
    """
    each, n = 1 / (lr * run.steps.clamp(min=1).double()), clients.task.layout.num_trainable
    if n == clients.task.layout.size:
        return run.delta * each
    delta = run.delta.dense()
    delta[:, :n] *= each.to(delta)[:, None]
    return Terms.of(delta)


def twice(local: LocalTraining) -> Cost:
    """The cost of a job that takes two gradients of every minibatch: the clock counts gradients, not steps."""
    return Cost(steps=lambda num_examples: 2 * local.schedule.num_steps(num_examples))


def step_size(gamma: float | None, server_lr: float, local: LocalTraining, replies: Replies) -> float:
    """gamma, by default server_lr * eta * K with the mean K of the clients that have data: parity with FedAvg."""
    if gamma is not None:
        return gamma
    steps = local.schedule.num_steps(replies.num_examples)
    taken = steps[steps > 0].double()
    return server_lr * local.lr * (float(taken.mean()) if len(taken) else 1.0)
