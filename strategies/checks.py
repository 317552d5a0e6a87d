"""Checks of hyper-parameters that several strategies share."""

from __future__ import annotations

from fedsim.clients.local_training import LocalTraining


def check_cohort(cohort_size: int | None, server_lr: float = 1.0) -> None:
    """Refuse an empty cohort and a server that does not move forward."""
    if cohort_size is not None and cohort_size < 1:
        raise ValueError(f"cohort_size must be at least 1, got {cohort_size}; null means every client")
    if not server_lr > 0:
        raise ValueError(f"server_lr must be positive, got {server_lr}")


def check_beta(beta: float) -> None:
    """beta is the weight of the fresh gradient, in (0, 1]."""
    if not 0 < beta <= 1:
        raise ValueError(f"beta is the weight of the fresh gradient and must lie in (0, 1], got {beta}")


def check_plain_sgd(name: str, local: LocalTraining) -> None:
    """Refuse local rules that would act on the corrected direction instead of the raw gradient."""
    if not local.optimizer.is_plain_sgd:
        raise ValueError(
            f"{name} corrects the direction of every local step, and local.optimizer would clip, decay or precondition "
            "the correction too; use local.optimizer {name: sgd} without momentum, weight_decay and clip"
        )
    _ = local.lr


def check_gamma(gamma: float | None) -> None:
    """gamma is a step size, or null for eta * K."""
    if gamma is not None and not gamma >= 0:
        raise ValueError(f"gamma must be 0 or more, or null for the local step size times the local steps; got {gamma}")


def check_lr(lr: float) -> None:
    """lr is the step that a strategy takes itself."""
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")


def check_refresh(lr: float, p: float) -> None:
    """lr is a step; p is the chance of a refresh, in (0, 1]."""
    check_lr(lr)
    if not 0 < p <= 1:
        raise ValueError(f"p, the chance of a refresh, must lie in (0, 1], got {p}")
