"""Tasks whose clients are one function each, given by a formula: every step uses it whole, and an epoch is one step.

Letters: C clients of a stack, k of them with examples, P entries of a client's vector, q points.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.optim.needs import clip_and_sum
from fedsim.optim.segments import Segments
from fedsim.streams import Streams
from fedsim.task import Schedule, Task


@dataclass(frozen=True)
class FormulaBatch:
    """Which clients, and the key of their noise."""

    rows: Tensor
    streams: Streams
    step: int


class FormulaTask(Task):
    """Gradient, loss and curvature of each client in closed form.

    Attributes:
        noise: standard deviation of keyed Gaussian noise on every entry of every gradient; 0 is exact.
    """

    noise: float

    @abstractmethod
    def formula(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient or operator [k, P], loss [k]) of clients rows [k] at x [k, P], without noise."""

    @abstractmethod
    def curvature(self, v: Tensor, rows: Tensor) -> Tensor:
        """[k, P]: the formula's Jacobian times v [k, P]."""

    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> OwnFunction:
        return OwnFunction(self.num_examples[ids], streams, schedule)

    def field(self, x: Tensor, batch: FormulaBatch) -> tuple[Tensor, Tensor]:
        g, loss = self.formula(x, batch.rows)
        if self.noise:
            g = g + self.noise * batch.streams.normal("noise", x.shape[1], step=batch.step)
        return g, loss

    def oracle(self, batch: FormulaBatch, buffers: Tensor) -> FormulaOracle:
        return FormulaOracle(self, batch)


class OwnFunction:
    """The batches of a stack, clients with examples first: `steps`, or `epochs` as steps, whatever the batch size."""

    def __init__(self, num_examples: Tensor, streams: Streams, schedule: Schedule) -> None:
        has_data = schedule.span(num_examples)[1] > 0
        self._active = int(has_data.sum())
        assert bool(has_data[: self._active].all()), "a stack must be ordered by number of local steps"
        self._streams = streams if self._active == len(num_examples) else streams.rows(slice(self._active))
        steps = schedule.steps if schedule.steps is not None else schedule.epochs
        assert steps is not None
        self._length = steps if self._active else 0
        self.num_steps = torch.where(has_data, steps, 0).to(streams.clients.device)

    def __len__(self) -> int:
        return self._length

    def active(self, step: int) -> int:
        return self._active

    def __getitem__(self, step: int) -> FormulaBatch:
        return FormulaBatch(self._streams.clients, self._streams, step)


class FormulaOracle:
    """See `fedsim.task.Oracle`; a client's function is its one sample, and there are no labels."""

    def __init__(self, task: FormulaTask, batch: FormulaBatch) -> None:
        self.task, self.batch = task, batch
        self.loss: Tensor | None = None

    def batch_sizes(self) -> Tensor:
        return torch.ones_like(self.batch.rows)

    def num_labels(self) -> Tensor:
        raise AssertionError("a formula has no labels")

    def sampled_grad(self, x: Tensor) -> Tensor:
        raise AssertionError("a formula has no labels")

    def losses(self, points: Tensor) -> Tensor:
        """[q, k]; the noise of a batch is a linear term of its loss, so that the gradient of the loss is the field."""
        found = torch.stack([self.task.formula(x, self.batch.rows)[1] for x in points])
        self.loss = found.mean(0)
        if self.task.noise:
            slope = self.batch.streams.normal("noise", points.shape[2], step=self.batch.step).to(points)
            found = found + self.task.noise * (points * slope).sum(-1)
        return found

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        return self.task.curvature(v, self.batch.rows)

    def clipped_sum(self, x: Tensor, bounds: Tensor) -> Tensor:
        gradient, self.loss = self.task.field(x, self.batch)
        return clip_and_sum(gradient[:, None], bounds, Segments.of(self.task.layout))
