"""What serverless strategies share.

Letters: n clients, P parameters.
"""

from __future__ import annotations

from torch import Tensor

from fedsim.clients.local_training import LocalTraining
from fedsim.fleet import Fleet, Replies


def honest_mean(fleet: Fleet, replies: Replies) -> tuple[Tensor, float]:
    """(mean [P] of the honest clients' models, mean squared distance to it)."""
    models = replies["x"]
    models = models[fleet.honest(replies.ids).to(models.device)]
    mean = models.mean(0)
    return mean, float((models - mean).square().sum(1).mean())


def local_rate(name: str, local: LocalTraining, round: int = 0) -> float:
    """The learning rate of a step that the strategy takes itself.

    Raises:
        ValueError: if the local optimizer is more than a learning rate.
    """
    optimizer = local.optimizer
    if not optimizer.is_plain_sgd or not isinstance(optimizer.lr, float | int):
        raise ValueError(
            f"{name} takes its own step: local.optimizer gives it a learning rate and a schedule only; use "
            "{name: sgd} without momentum, weight_decay and clip"
        )
    factor = (
        1.0
        if optimizer.schedule is None
        else optimizer.schedule.at_step(rounds=round, steps=round, fraction=round / local.rounds)
    )
    return float(optimizer.lr) * factor
