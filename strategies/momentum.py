"""What FedAvg-M, SCAFFOLD-M and their variance-reduced forms share.

Letters: C clients of a stack, R replies, P parameters, K_i local steps of a client, eta the local step.
"""

from __future__ import annotations

from torch import Tensor

from clients.local_sgd import LocalResult, LocalSGD
from fedsim.fleet import Replies


def along(local: LocalResult, eta: float) -> Tensor:
    """[C, P]: Delta_i / (eta * K_i), the mean direction of a client's steps; zero for a client that took none."""
    return local.delta.div_(eta * local.steps.clamp(min=1).to(local.delta)[:, None])


def step_size(gamma: float | None, server_lr: float, local: LocalSGD, replies: Replies) -> float:
    """gamma, by default server_lr * eta * K with the mean K of the clients that have data: parity with FedAvg."""
    if gamma is not None:
        return gamma
    steps = local.schedule.num_steps(replies.num_examples)
    taken = steps[steps > 0].double()
    return server_lr * local.lr * (float(taken.mean()) if len(taken) else 1.0)
