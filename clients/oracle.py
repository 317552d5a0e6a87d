"""Oracles: the gradient or operator of every client of a stack at given points, and the loss.

Letters: C clients, P entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.task import Schedule

FULL = Schedule(epochs=1, batch_size=None, shuffle=False)
PIECE = 512
CHUNK = Schedule(epochs=1, batch_size=PIECE, shuffle=False)


def full_gradient(cohort: Cohort, x: Tensor) -> Tensor:
    """[C, P]: each client's gradient at x ([P] or [C, P]) over all of its data; zero for a client without any.

    Data are taken in pieces of at most 512 samples, each weighted by its share.
    """
    batches = cohort.task.batches(cohort.ids, cohort.streams, CHUNK)
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


def full_loss(cohort: Cohort, x: Tensor) -> Tensor:
    """[C] float64: each client's mean loss at x [P] over all of its data, as a step would see it; zero without data."""
    batches = cohort.task.batches(cohort.ids, cohort.streams, CHUNK)
    total = torch.zeros(len(cohort), dtype=torch.float64, device=x.device)
    counts = cohort.num_examples.to(x.device)
    for step in range(len(batches)):
        k = batches.active(step)
        _, loss = cohort.task.field(
            x.expand(k, -1).clone(), batches[step]
        )  # alone, the forward pass of a small model takes as long
        total[:k] += (counts[:k] - step * PIECE).clamp(1, PIECE) * loss.double()
    return total / counts.clamp(min=1)


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
