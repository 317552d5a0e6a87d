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

import numpy as np
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
        counts: [C] on the host, samples of each client, in an order in which steps do not increase.
        schedule: epochs or steps, batch size, shuffling.
        streams: of the stack; `job` in its key makes every round's order fresh. Positions lie on their device.
        gather: (step, k, columns, weights [k, B] or None) -> the batch of the first k clients with the samples at
            `rows[:k, columns]`; step None stands for all steps side by side. `Samples` if left out.
        locate: positions [C, M] -> rows of the data set [C, M], done once for all steps; the identity if left out. It
            may put them where the data lie.

    What decides shapes is reckoned on the host from the counts, so that nobody waits for the device.

    Attributes:
        num_steps: [C] on the device.
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
        start, counts = schedule.span(counts)
        table = torch.stack([counts, schedule.num_steps(counts), schedule.steps_per_epoch(counts)])
        num_samples, num_steps, per_epoch = here = table.numpy()
        there = table.to(streams.clients.device)  # in one transfer
        self._gather = gather or self._samples
        if (num_steps[1:] > num_steps[:-1]).any():
            raise AssertionError("a stack must be ordered by number of local steps")
        largest = int(num_samples.max(initial=0))
        self._width = largest if schedule.batch_size is None else min(schedule.batch_size, largest)
        self.num_steps = there[1]
        positions = _positions(here, there, schedule, streams, self._width)
        self.rows = locate(positions if schedule.part is None else positions + start.to(there.device)[:, None])
        step = np.arange(num_steps.max(initial=0))
        active = num_steps[:, None] > step
        before = step % np.maximum(per_epoch, 1)[:, None] * self._width  # samples of the epoch that came earlier
        self._filled = np.where(active, np.minimum(num_samples[:, None] - before, self._width), 0)
        cut = self._filled.max(0, initial=0)
        self._active: list[int] = active.sum(0).tolist()
        self._cut: list[int] = cut.tolist()
        self._full: list[bool] = ((self._filled == cut) | ~active).all(0).tolist()

    def __len__(self) -> int:
        return len(self._active)

    def active(self, step: int) -> int:
        """How many of the first clients still take this step."""
        return self._active[step]

    def counts(self, step: int | None, k: int) -> list[int] | None:
        """[k] samples of the first clients in a step, known without asking the device; None for all steps at once."""
        found: list[int] | None = None if step is None else self._filled[:k, step].tolist()
        return found

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
        weights = None if (self._filled == self._width).all() else self._valid.flatten(1)
        return self._gather(None, len(self.rows), slice(None), weights), self._width, self._active

    def __getitem__(self, step: int) -> Any:
        k, cut, start = self._active[step], self._cut[step], step * self._width
        columns = slice(start, start + cut)
        weights = None if self._full[step] else self._valid[:k, step, :cut]
        return self._gather(step, k, columns, weights)

    @cached_property
    def _valid(self) -> Tensor:
        """[C, K, B] float32: one for samples, zero for padding."""
        column = torch.arange(self._width, device=self.num_steps.device)
        return (column < torch.from_numpy(self._filled).to(column.device)[:, :, None]).to(torch.float32)

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


def _positions(here: np.ndarray, there: Tensor, schedule: Schedule, streams: Streams, width: int) -> Tensor:
    """[C, K * width] positions, one epoch's order after the other; 0 for padding.

    Args:
        here: [3, C] on the host: samples, steps and steps per epoch of each client.
        there: the same on the device.
        schedule, streams: of the stack.
        width: B.
    """
    counts, num_steps, per_epoch = there
    largest, most_steps, longest = (int(n) for n in here.max(1, initial=0))
    total = most_steps * width
    # padding of short epochs is scattered into one column beyond the end
    positions = torch.zeros(len(counts), total + 1, dtype=torch.int64, device=counts.device)
    if total == 0:
        return positions[:, :0]
    span, num_epochs = longest * width, int((-(-here[1] // np.maximum(here[2], 1))).max())
    column = torch.arange(span, device=counts.device)
    own, end = column < counts[:, None], (num_steps * width)[:, None]
    for epoch in range(num_epochs):
        target = epoch * (per_epoch * width)[:, None] + column
        target = torch.where(own & (target < end), target, total)
        if schedule.shuffle:
            order = streams.permutation("batches", counts, epoch, largest)
            order = order if span == largest else torch.nn.functional.pad(order, (0, span - largest))
        else:
            order = column.expand(len(counts), span)
        positions.scatter_(1, target, order)
    return positions[:, :total]
