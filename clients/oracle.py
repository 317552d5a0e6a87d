"""Oracles: the gradient or operator of every client of a stack at given points, and the loss.

Letters: C clients of a stack, N in all, P entries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.streams import Streams
from fedsim.task import Batches, Schedule
from fedsim.terms import Terms

FULL = Schedule(epochs=1, batch_size=None, shuffle=False)
PIECE = 512
CHUNK = Schedule(epochs=1, batch_size=PIECE, shuffle=False)


def full_gradient(cohort: Cohort, x: Tensor, part: tuple[int, int, int] | None = None) -> Tensor:
    """[C, P]: each client's gradient at x ([P] or [C, P]) over all of its data; zero for a client without any.

    Data are taken in pieces of at most 512 samples, each weighted by its share.

    Args:
        cohort: the clients, those that have most samples (of the part) first.
        x: where.
        part: of everybody's data, as in `Schedule.part`; None for all.
    """
    schedule = CHUNK if part is None else replace(CHUNK, part=part)
    return _over_pieces(cohort, x, cohort.task.batches(cohort.ids, cohort.streams, schedule), schedule)


def full_gradient_in_terms(cohort: Cohort, x: Tensor) -> Terms:
    """The same as terms, which nobody needs to form to add them up; where one piece is all, in factors if it can be."""
    batches = cohort.task.batches(cohort.ids, cohort.streams, CHUNK)
    factored = cohort.task.factored_gradients(x, batches) if len(batches) == 1 else None
    return Terms.of(_over_pieces(cohort, x, batches, CHUNK) if factored is None else factored[0])


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


def _over_pieces(cohort: Cohort, x: Tensor, batches: Batches, schedule: Schedule) -> Tensor:
    point = torch.empty(len(cohort), x.shape[-1], dtype=x.dtype, device=x.device).copy_(x)
    total = torch.zeros_like(point)
    seen = torch.zeros(len(cohort), 1, dtype=x.dtype, device=x.device)
    counts = schedule.span(cohort.num_examples)[1].to(x.device)
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


def coded_gradient(
    cohort: Cohort, x: Tensor, coefficients: Tensor, job: int, part: tuple[int, int, int] | None = None
) -> Tensor:
    """[C, P]: for each client of the stack a weighted sum of gradients of all clients' data.

    With all coefficients 1 and no part it is the gradient of the mean loss over everybody's samples. Each owner's
    gradient is taken once for the stack, however many clients of it work on its data.

    Args:
        cohort: who computes; it need not own the data.
        x: [P], where.
        coefficients: [C, N] float64 on the host: of each owner's gradient, which counts by its share of all samples.
        job: number of the training step, which keys what a task or a model draws, the same for whoever computes it.
        part: of every owner's data, as in `Schedule.part`; None for all.
    """
    num_examples, width = cohort.task.num_examples, len(cohort)
    counts = replace(CHUNK, part=part).span(num_examples)[1]
    owners = torch.nonzero((coefficients != 0).any(0) & (counts > 0)).flatten()
    owners = owners[torch.argsort(counts[owners], descending=True, stable=True)]
    weights = coefficients * counts / max(int(num_examples.sum()), 1)
    total = torch.zeros(width, x.shape[-1], dtype=x.dtype, device=x.device)
    for ids in owners.split(width):
        there = ids.to(x.device)
        streams = Streams(cohort.streams.seed, there, torch.full_like(there, job))
        g = full_gradient(replace(cohort, ids=ids, streams=streams), x, part)
        total += weights[:, ids].to(g) @ g
    return total
