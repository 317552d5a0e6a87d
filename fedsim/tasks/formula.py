"""Tasks whose clients are one function each, given by a formula, that every step uses whole.

Examples count as copies of it: a client of one takes one step an epoch, of more as many as minibatches of these.

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
    """The batches of a stack, those that take most steps first: as many as of samples, and each the whole function."""

    def __init__(self, num_examples: Tensor, streams: Streams, schedule: Schedule) -> None:
        num_steps = schedule.num_steps(schedule.span(num_examples)[1])
        assert not bool((num_steps[1:] > num_steps[:-1]).any()), "a stack must be ordered by number of local steps"
        length = int(num_steps.max()) if len(num_steps) else 0
        self._active: list[int] = (num_steps[:, None] > torch.arange(length)).sum(0).tolist()
        self._streams = {k: streams if k == len(num_steps) else streams.rows(slice(k)) for k in set(self._active)}
        self.num_steps = num_steps.to(streams.clients.device)

    def __len__(self) -> int:
        return len(self._active)

    def active(self, step: int) -> int:
        return self._active[step]

    def __getitem__(self, step: int) -> FormulaBatch:
        streams = self._streams[self._active[step]]
        return FormulaBatch(streams.clients, streams, step)


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
