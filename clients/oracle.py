"""Oracles: the gradient or operator of every client of a stack at given points.

Letters: C clients, P entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.task import Batches, Schedule
from fedsim.terms import Terms

FULL = Schedule(epochs=1, batch_size=None, shuffle=False)
PIECE = 512
CHUNK = Schedule(epochs=1, batch_size=PIECE, shuffle=False)


def full_gradient(cohort: Cohort, x: Tensor) -> Tensor:
    """[C, P]: each client's gradient at x ([P] or [C, P]) over all of its data; zero for a client without any.

    Data are taken in pieces of at most 512 samples, each weighted by its share.
    """
    return _over_pieces(cohort, x, cohort.task.batches(cohort.ids, cohort.streams, CHUNK))


def full_gradient_in_terms(cohort: Cohort, x: Tensor) -> Terms:
    """The same as terms, which nobody needs to form to add them up; where one piece is all, in factors if it can be."""
    batches = cohort.task.batches(cohort.ids, cohort.streams, CHUNK)
    factored = cohort.task.factored_gradients(x, batches) if len(batches) == 1 else None
    return Terms.of(_over_pieces(cohort, x, batches) if factored is None else factored[0])


def gradient_sum(cohort: Cohort, x: Tensor, schedule: Schedule) -> tuple[Terms, Tensor, Tensor]:
    """The gradients of a local run that moves nowhere.

    Args:
        cohort: the clients.
        x: [P], where they stay.
        schedule: how many minibatches each takes.

    Returns:
        (sum of each client's gradients at x [C, P], sum of its losses [C], its minibatches [C]).
    """
    batches = cohort.task.batches(cohort.ids, cohort.streams, schedule)
    factored = cohort.task.factored_gradients(x, batches)
    if factored is not None:
        return Terms.of(factored[0]), factored[1], batches.num_steps
    y = cohort.scratch("y", x)
    total, losses = torch.zeros_like(y), torch.zeros(len(cohort), device=y.device)
    for step in range(len(batches)):
        k = batches.active(step)
        y[:k] = x  # a training pass moves buffers
        g, loss = cohort.task.session(y[:k]).gradient(batches[step], cohort.scratch("gradient", y)[:k])
        total[:k] += g
        losses[:k] += loss.to(losses.dtype)
    return Terms.of(total), losses, batches.num_steps


def _over_pieces(cohort: Cohort, x: Tensor, batches: Batches) -> Tensor:
    point = torch.empty(len(cohort), x.shape[-1], dtype=x.dtype, device=x.device).copy_(x)
    total = torch.zeros_like(point)
    seen = torch.zeros(len(cohort), 1, dtype=x.dtype, device=x.device)
    counts = cohort.num_examples.to(x.device)
    for step in range(len(batches)):
        k = batches.active(step)
        batch = batches[step]
        g, _ = cohort.task.field(point[:k].clone(), batch)
        share = (counts[:k] - step * PIECE).clamp(1, PIECE).to(x)[:, None]
        total[:k] += share * g
        seen[:k] += share
    return total / seen.clamp(min=1)


def gradient(cohort: Cohort, *points: Tensor, batch_size: int | None, step: int = 0) -> list[Tensor]:
    """[C, P] at each point, all on one and the same minibatch of every client; `step` keys which.

    A client without data gives zero.
    """
    schedule = FULL if batch_size is None else Schedule(epochs=None, steps=step + 1, batch_size=batch_size)
    batches = cohort.task.batches(cohort.ids, cohort.streams, schedule)
    out = [torch.zeros(len(cohort), p.shape[-1], dtype=p.dtype, device=p.device) for p in points]
    if len(batches):
        at = min(step, len(batches) - 1)
        k = batches.active(at)
        batch = batches[at]
        for g, p in zip(out, points, strict=True):
            stack = torch.empty_like(g).copy_(p)[:k]
            g[:k] = cohort.task.field(stack, batch)[0]
    return out
