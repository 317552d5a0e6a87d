"""Minibatch plans: which samples every client of a stack uses in every local step.

Letters: C clients, K local steps of the busiest client, B samples of a minibatch.

A client's plan depends on its own stream and its own sample count alone. Clients with fewer samples than a batch
take short batches, the last batch of an epoch may be short, and clients without samples take no step. A step is
cut to the longest batch among its active clients, so rows are padded only where clients truly differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.streams import Streams
from fedsim.task import Schedule


class Samples(NamedTuple):
    """A minibatch of k clients: rows [k, B] of the data set, each one's share [k, B] of its client's mean.

    Shares of a client add up to one; rows beyond the end of a short batch repeat some row and have a share of zero.
    """

    rows: Tensor
    shares: Tensor


class BatchPlan:
    """Positions of samples (0..n_i - 1) for every step of a stack.

    Args:
        counts: [C] samples of each client, in an order in which steps do not increase.
        schedule: epochs or steps, batch size, shuffling.
        streams: of the stack; `job` in its key makes every round's order fresh.
        gather: (step, k, columns, weights [k, B] or None) -> the batch of the first k clients with the samples at
            `rows[:k, columns]`; step None stands for all steps side by side. `Samples` if left out.
        locate: positions [C, M] -> rows of the data set [C, M], done once for all steps; the identity if left out.

    Attributes:
        rows: [C, M], what `locate` gave for all steps, B columns to each.
    """

    def __init__(
        self,
        counts: Tensor,
        schedule: Schedule,
        streams: Streams,
        gather: Callable[[int | None, int, slice, Tensor | None], Any] | None = None,
        locate: Callable[[Tensor], Tensor] = lambda positions: positions,
    ) -> None:
        self.num_steps = schedule.num_steps(counts)
        self._gather = gather or self._samples
        if len(counts) > 1 and bool((self.num_steps[1:] > self.num_steps[:-1]).any()):
            raise AssertionError("a stack must be ordered by number of local steps")
        largest = int(counts.max()) if len(counts) else 0
        self._width = largest if schedule.batch_size is None else min(schedule.batch_size, largest)
        positions, valid = _positions(counts, schedule, streams, self.num_steps, self._width)
        self.rows = locate(positions)
        steps = self.num_steps.cpu()
        last = int(steps[0]) if len(steps) else 0
        active = steps[:, None] > torch.arange(last)
        filled = valid.cpu().view(len(counts), last, self._width).sum(2)
        cut = filled.amax(0) if last else filled.new_zeros(0)
        self._active: list[int] = active.sum(0).tolist()
        self._cut: list[int] = cut.tolist()
        self._full: list[bool] = ((filled == cut) | ~active).all(0).tolist()
        self._valid = valid

    def __len__(self) -> int:
        return len(self._active)

    def active(self, step: int) -> int:
        """How many of the first clients still take this step."""
        return self._active[step]

    def _samples(self, step: int | None, k: int, columns: slice, weights: Tensor | None) -> Samples:
        rows = self.rows[:k, columns]
        counted = torch.ones(rows.shape, device=rows.device) if weights is None else weights
        return Samples(rows, counted / counted.sum(1, keepdim=True))

    @property
    def samples(self) -> int:
        """R: samples of the busiest client's whole run, padding of short batches included."""
        return len(self) * self._width

    def whole(self) -> tuple[Any, int, list[int]]:
        """(all steps as one batch [C, K * B], B, active clients of each step); padding weighs zero."""
        weights = None if bool(self._valid.all()) else self._valid.to(torch.float32)
        return self._gather(None, len(self.rows), slice(None), weights), self._width, self._active

    def __getitem__(self, step: int) -> Any:
        k, cut, start = self._active[step], self._cut[step], step * self._width
        columns = slice(start, start + cut)
        weights = None if self._full[step] else self._valid[:k, columns].to(torch.float32)
        return self._gather(step, k, columns, weights)

    @cached_property
    def lines(self) -> list[tuple[int, int] | None]:
        """For each step (first, gap) if its rows[i, j] are first + i * gap + j without padding, else None."""
        rows = self.rows.view(len(self.rows), len(self), self._width).cpu()
        number = torch.arange(self._width)
        active = torch.arange(len(rows))[:, None] < torch.tensor(self._active)
        in_a_row = (rows == rows[:, :, :1] + number) | (number >= torch.tensor(self._cut)[:, None])
        first = rows[:, :, 0]
        gap = torch.where(torch.tensor(self._active) > 1, first[min(1, len(rows) - 1)] - first[0], 0)
        even = (first == first[0] + torch.arange(len(rows))[:, None] * gap) & in_a_row.all(2)
        fits = (even | ~active).all(0) & torch.tensor(self._full) & (gap >= 0)
        found = zip(first[0].tolist(), gap.tolist(), strict=True)
        return [line if ok else None for line, ok in zip(found, fits.tolist(), strict=True)]


def _positions(
    counts: Tensor, schedule: Schedule, streams: Streams, num_steps: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """(positions [C, K * width], valid [C, K * width] bool): one epoch's order after the other."""
    per_epoch = schedule.steps_per_epoch(counts)
    total = int(num_steps.max()) * width if len(counts) else 0
    dump = total  # padding of short epochs is scattered into one column beyond the end
    positions = torch.zeros(len(counts), total + 1, dtype=torch.int64, device=counts.device)
    valid = torch.zeros(len(counts), total + 1, dtype=torch.bool, device=counts.device)
    if total == 0:
        return positions[:, :0], valid[:, :0]
    span = int(per_epoch.max()) * width
    column = torch.arange(span, device=counts.device)
    num_epochs = -(-num_steps // per_epoch.clamp(min=1))
    for epoch in range(int(num_epochs.max())):
        order = _order(counts, schedule, streams, epoch, span)
        target = epoch * (per_epoch * width)[:, None] + column
        ok = (column < counts[:, None]) & (target < (num_steps * width)[:, None])
        target = torch.where(ok, target, dump)
        positions.scatter_(1, target, order)
        valid.scatter_(1, target, ok)
    return positions[:, :total], valid[:, :total]


def _order(counts: Tensor, schedule: Schedule, streams: Streams, epoch: int, span: int) -> Tensor:
    """[C, span]: the order of one epoch; columns beyond a client's count hold any valid number."""
    if not schedule.shuffle:
        return torch.arange(span, device=counts.device).expand(len(counts), span)
    order = streams.permutation("batches", counts, step=epoch)
    return order if order.shape[1] == span else torch.nn.functional.pad(order, (0, span - order.shape[1]))
