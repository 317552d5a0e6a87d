"""Classification (and next-token prediction) on federated data with any torch module.

Letters: N clients, C clients of a stack, B samples of a batch, P entries of a client's vector, n training samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import pages
from fedsim.data.federated import FederatedData
from fedsim.engine import Batch, Engine
from fedsim.engine.losses import per_sample
from fedsim.engine.low_rank import LowRank, gradients_at, low_rank_run
from fedsim.params import Layout, on_device
from fedsim.streams import Streams
from fedsim.task import Pool, Schedule, Session, Task
from fedsim.tasks.batches import BatchPlan
from fedsim.tasks.samples import Program, SamplesOracle

EVALUATION_ROWS = 1024  # samples of one piece of evaluation; part of what fixes the bits


class ClassificationTask(Task):
    """One module trained on every client's samples.

    Args:
        data: the federated data set.
        module: any module that maps inputs [B, ...] to logits [B, K] (or [B, T, K] for sequences).
        x0: [P], the initial parameters and buffers in `Layout.of_module(module)`'s order.
        engine: computes the gradients of a stack.
        sample_loss: (logits, targets) -> [B] losses; the same that the engine minimises.
        held: what the same clients hold out of their samples, in the clients' order; None if nothing.
    """

    def __init__(
        self,
        data: FederatedData,
        module: nn.Module,
        x0: Tensor,
        engine: Engine,
        sample_loss: Callable[[Tensor, Tensor], Tensor],
        held: FederatedData | None = None,
    ) -> None:
        data = by_client(data)
        self.data, self.module, self.x0, self.engine, self.sample_loss = data, module, x0, engine, sample_loss
        self.layout = Layout.of_module(module)
        self.held, self.holds_out = held, held is not None
        self.num_examples = data.num_examples.cpu()
        self._poisoned: Tensor | None = None
        self._poison: Callable[[Tensor, int], Tensor] | None = None

    def poison(self, ids: Tensor, labels: Callable[[Tensor, int], Tensor]) -> None:
        self._poisoned = torch.zeros(len(self.num_examples), dtype=torch.bool, device=self.data.targets.device)
        self._poisoned[ids.to(self._poisoned.device)] = True
        self._poison = labels

    def init(self, seed: int) -> Tensor:
        return self.x0.clone()

    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> BatchPlan:
        data = self.data
        views = not schedule.shuffle and self._may_view()

        def gather(step: int | None, k: int, columns: slice, weights: Tensor | None) -> Batch:
            labels = read(plan.rows[:k, columns]) if targets is None else targets[:k, columns]
            line = plan.lines[step] if views and step is not None else None
            if line is None:
                inputs = _copy(data.inputs, plan.rows[:k, columns])
            else:
                inputs = _view(data.inputs, labels.shape[:2], *line)
            own = streams if k == len(ids) else streams.rows(slice(k))
            return Batch(inputs, labels, weights, own, step or 0)

        def read(rows: Tensor) -> Tensor:
            found = _copy(data.targets, rows)
            if self._poisoned is None or self._poison is None:
                return found
            lying = self._poisoned[streams.clients[: len(rows)]].view(-1, *[1] * (found.ndim - 1))
            return torch.where(lying, self._poison(found, data.num_classes), found)

        def locate(positions: Tensor) -> Tensor:
            return data.rows(streams.clients, positions)

        plan = BatchPlan(self.num_examples[ids], schedule, streams, gather, locate)
        targets = read(plan.rows) if data.targets.ndim == 1 else None  # all at once where that takes no more than rows
        return plan

    def _may_view(self) -> bool:
        """Whether samples in their own order may be a view of the data set."""
        return self.engine.reads_only(self.data.inputs[0])

    def field(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.session(x).gradient(batch)

    def session(self, x: Tensor) -> Session:
        return self.engine.session(x)

    def factored_run(
        self,
        x: Tensor,
        batches: BatchPlan,
        lr: float,
        scale: float,
        pull: float,
        terms: Sequence[tuple[float, Tensor]],
        less_start: bool = False,
    ) -> tuple[LowRank, Tensor] | None:
        """See `Task`. Exact up to rounding, for chains of linear layers that see fewer samples than they are wide."""
        chain = self.engine.chain
        if chain is None or not len(batches) or not chain.worthwhile(batches.samples * (1 + less_start)):
            return None
        return low_rank_run(chain, self.layout, x, *batches.whole(), lr, scale, pull, terms, less_start)

    def factored_gradients(self, x: Tensor, batches: BatchPlan) -> tuple[LowRank, Tensor] | None:
        chain = self.engine.chain
        if chain is None or not len(batches):
            return None
        return gradients_at(chain, self.layout, x, *batches.whole())

    @cached_property
    def _program(self) -> Program:
        return Program(on_device(self.module, self.data.inputs.device), self.layout, self.sample_loss)

    def lacks(self, need: str) -> str | None:
        data, one = self.data, torch.zeros(1, dtype=torch.int64, device=self.data.inputs.device)
        batch = Batch(data.inputs[None, :2], data.targets[None, :2], None, Streams(0, one, one))
        return self._program.lacks(need, self.x0[None].to(one.device), batch)

    def oracle(self, batch: Batch, buffers: Tensor) -> SamplesOracle:
        return SamplesOracle(self._program, batch, buffers)

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        data = self.data
        loss, hit = self._score(x, data.test_inputs, data.test_targets, None, pool)
        if not len(loss):
            return {}
        return {"test_loss": float(loss.mean()), "test_accuracy": float(hit.mean())}

    def evaluate_clients(self, x: Tensor, pool: Pool) -> dict[str, Tensor]:
        """[N] mean loss and accuracy of the one model x [P] on every client's own training samples."""
        data = self.data
        loss, hit = self._score(x, data.inputs, data.targets, data.order, pool)
        owner = torch.repeat_interleave(torch.arange(len(self.num_examples)), self.num_examples)
        total = torch.zeros(2, len(self.num_examples), dtype=torch.float64)
        total[0].index_add_(0, owner, loss)
        total[1].index_add_(0, owner, hit)
        mean = total / self.num_examples
        return {"loss": mean[0], "accuracy": mean[1]}

    def evaluate_own(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        """See `Task`: mean loss and accuracy, one client after the other."""
        assert self.held is not None
        ends, found = self.held.offsets.cpu(), []
        for i, own in zip(ids.tolist(), x, strict=True):
            span = slice(int(ends[i]), int(ends[i + 1]))
            loss, hit = self._score(own, self.held.inputs[span], self.held.targets[span], None, _Here())
            found.append([len(loss), float(loss.mean()), float(hit.mean())])
        columns = zip(("examples", "loss", "accuracy"), zip(*found, strict=True), strict=True)
        return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns}

    def _score(
        self, x: Tensor, inputs: Tensor, targets: Tensor, rows: Tensor | None, pool: Pool
    ) -> tuple[Tensor, Tensor]:
        """Per-sample (loss, hit) in float64; samples are cut at fixed places, so no number of workers shows."""
        total = len(targets) if rows is None else len(rows)
        views = rows is None and self._may_view()

        def piece(start: int) -> Tensor:
            span = slice(start, min(start + EVALUATION_ROWS, total))
            which = span if rows is None else rows[span]
            samples, classes = inputs[which], targets[which]
            if rows is None and not views:  # a module may write to what it is given
                samples = samples.clone()
            with torch.no_grad():
                logits = self.engine.logits(x, samples)
                loss = self.sample_loss(logits, classes).double()
                hit = (logits.argmax(-1) == classes).double()
            return torch.stack([per_sample(loss), per_sample(hit)]).cpu()

        pieces = pool.map(piece, list(range(0, total, EVALUATION_ROWS)))
        both = torch.cat(pieces, dim=1) if pieces else torch.zeros(2, 0, dtype=torch.float64)
        return both[0], both[1]


class _Here:
    """Pieces of an evaluation one after the other, by whoever asks."""

    def map(self, function: Any, pieces: list[Any]) -> list[Any]:
        return [function(piece) for piece in pieces]


def by_client(data: FederatedData) -> FederatedData:
    """The same data with each client's samples side by side in memory, so that gathering a batch reads in a row.

    Samples that nobody owns are dropped; data whose samples have several owners stay as they are.
    """
    order = data.order
    if len(torch.unique(order)) != len(order) or torch.equal(order, torch.arange(len(order), device=order.device)):
        return data
    inputs, targets = pages.take(data.inputs, order), data.targets.index_select(0, order)
    return replace(data, inputs=inputs, targets=targets, order=torch.arange(len(order), device=order.device))


def _copy(pool: Tensor, rows: Tensor) -> Tensor:
    """[k, B, ...] from rows [k, B] of a pool of samples."""
    return pool.index_select(0, rows.reshape(-1)).view(*rows.shape, *pool.shape[1:])


def _view(pool: Tensor, shape: Sequence[int], first: int, gap: int) -> Tensor:
    """The same without a copy for `shape` [k, B], where rows[i, j] = first + i * gap + j."""
    sample, *inner = pool.stride()
    start = pool.storage_offset() + first * sample
    return pool.as_strided((*shape, *pool.shape[1:]), (gap * sample, sample, *inner), start)
