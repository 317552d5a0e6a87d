"""What FedAvg-M, SCAFFOLD-M and their variance-reduced forms share.

Letters: C clients of a stack, R replies, P parameters, K_i local steps of a client, eta the local step.
"""

from __future__ import annotations

from torch import Tensor

from fedsim.clients.combination import Combination
from fedsim.clients.local_sgd import LocalResult, LocalSGD
from fedsim.fleet import Cost, Replies
from fedsim.task import Factored


def along(result: LocalResult, local: LocalSGD) -> Tensor | Factored:
    """[C, P]: Delta_i / (eta * K_i), the mean direction of a client's steps; zero for a client that took none.

    Entries of buffers are left as they are: their change is no direction. A change that local training left as a
    weighted sum stays one.
    """
    if isinstance(result.update, Combination):
        return result.update * (1 / (local.lr * result.steps.clamp(min=1).double()))
    delta = result.delta
    delta[:, : local.num_trainable].div_(local.lr * result.steps.clamp(min=1).to(delta)[:, None])
    return delta


def twice(local: LocalSGD) -> Cost:
    """The cost of a job that takes two gradients of every minibatch: the clock counts gradients, not steps."""
    return Cost(steps=lambda num_examples: 2 * local.schedule.num_steps(num_examples))


def step_size(gamma: float | None, server_lr: float, local: LocalSGD, replies: Replies) -> float:
    """gamma, by default server_lr * eta * K with the mean K of the clients that have data: parity with FedAvg."""
    if gamma is not None:
        return gamma
    steps = local.schedule.num_steps(replies.num_examples)
    taken = steps[steps > 0].double()
    return server_lr * local.lr * (float(taken.mean()) if len(taken) else 1.0)
