"""Local runs of plain SGD along a shifted direction that also keep the sum of the raw gradients.

With one rate the local model needs no memory of its own: after k steps along u = scale * g + shift it is

    y = x - lr * (scale * s + k * shift),    s the sum of the k raw gradients so far.

So only s is accumulated, inside the backward products where the engine can; y is formed anew from it before each step
after the first, and never after the last. The change of the client is known from s without it. (Where the direction
pulls at the local model, y follows from another sum than the mean gradient does, and steps are taken one by one.)

Letters: C clients of a stack, k of them still stepping, P entries, K_i steps of a client.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.clients.direction import Direction
from fedsim.clients.stepwise import steps_of
from fedsim.cohort import Cohort
from fedsim.task import Batches, Session


def corrected_run(cohort: Cohort, x: Tensor, batches: Batches, lr: float, u: Direction) -> tuple[Tensor, Tensor]:
    """A whole local run from x ([P] or [C, P]) without buffers, along a direction that looks at no other point.

    Returns:
        (mean of each client's raw gradients [C, P], sum of its losses [C]).
    """
    y = cohort.scratch("y", x).copy_(x)
    total = cohort.scratch("grad_sum", x)
    losses = torch.zeros(len(cohort), device=y.device)
    for step, k, session, batch in steps_of(cohort.task, batches, y):
        if step == 0:
            _, loss = session.gradient(batch, total[:k])
            total[k:] = 0
        else:
            _place_(y[:k], x, total[:k], lr, u, step)
            loss = _add_gradient_(total[:k], session, batch, cohort.scratch("gradient", y)[:k])
        losses[:k] += loss.to(losses.dtype)
    steps = batches.num_steps
    return total / steps.clamp(min=1)[:, None] if len(batches) else torch.zeros_like(y), losses


def _add_gradient_(total: Tensor, session: Session, batch: Any, spare: Tensor) -> Tensor:
    """total += g at the session's model; loss [k]. A step of rate 0 is just that, where the engine has fused steps."""
    fused = session.sgd_step_(batch, 0.0, grad_sum=total)
    if fused is not None:
        return fused
    g, loss = session.gradient(batch, spare)
    total += g
    return loss


def _place_(y: Tensor, x: Tensor, total: Tensor, lr: float, u: Direction, step: int) -> None:
    """y [k, P] <- x - lr * (scale * total + step * shift); what all clients share is added up first."""
    at = x if x.ndim == 1 else x[: len(y)]
    for weight, term in sorted(u.terms, key=lambda t: t[1].ndim):
        term = term if term.ndim == 1 else term[: len(y)]
        at = torch.add(at, term, alpha=-lr * step * weight, out=y if max(at.ndim, term.ndim) > 1 else None)
    torch.sub(at, total, alpha=lr * u.scale, out=y)
