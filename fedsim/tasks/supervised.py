"""Samples with targets on federated data: any torch module, any loss per sample, any metrics.

Letters: N clients, C clients of a stack, B samples of a batch, P entries of a client's vector, n training samples,
M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedsim import pages
from fedsim.data.federated import FederatedData
from fedsim.engine import Batch, Engine
from fedsim.engine.losses import Loss, per_sample
from fedsim.engine.low_rank import Chain, LowRank, gradients_at, low_rank_run
from fedsim.params import Layout, on_device
from fedsim.prox import FREE, Prox
from fedsim.streams import Streams, as_uniform, mix64
from fedsim.task import Poison, Pool, Schedule, Session, Task, Walk
from fedsim.tasks.batches import BatchPlan
from fedsim.tasks.metrics import Metric
from fedsim.tasks.samples import Program, SamplesOracle
from fedsim.tasks.staging import Reader, Resident, Staged
from fedsim.trees import Tree, each, one, pick, tensors

EVALUATION_ROWS = 1024  # samples of one piece of evaluation; part of what fixes the bits


class SupervisedTask(Task):
    """One module trained on every client's samples.

    Args:
        data: the federated data set.
        module: any module that takes inputs [B, ...], those of a dictionary as keyword arguments, and gives what
            `engine.functional.tensor_of` finds a tensor in.
        x0: [P], the initial parameters and buffers in `Layout.of_module(module)`'s order.
        engine: computes the gradients of a stack.
        sample_loss: (outputs, targets) -> [B] losses; the same that the engine minimises.
        held: what the same clients hold out of their samples, in the clients' order; None if nothing.
        metrics: by the names that rows give them, beside the loss.
        prox: see `Task`.
        device: where stacks are computed, if the data do not lie there but on the host.
    """

    def __init__(
        self,
        data: FederatedData,
        module: nn.Module,
        x0: Tensor,
        engine: Engine,
        sample_loss: Loss,
        held: FederatedData | None = None,
        metrics: Mapping[str, Metric] = MappingProxyType({}),
        prox: Prox = FREE,
        device: torch.device | None = None,
    ) -> None:
        data = by_client(data)
        here = one(data.inputs).device
        self.device = here if device is None else device
        self.read: Reader = Resident() if here.type == self.device.type else Staged(self.device)
        self.data, self.module, self.x0, self.engine, self.sample_loss = data, module, x0, engine, sample_loss
        self.layout = Layout.of_module(module)
        self.held, self.holds_out, self.prox = held, held is not None, prox
        self.num_examples = data.num_examples.cpu()
        self.metrics = dict(metrics)
        self._means = {name: metric for name, metric in metrics.items() if not metric.whole}
        self._wholes = {name: metric for name, metric in metrics.items() if metric.whole}
        self._poison: Poison | None = None
        self._liars = torch.zeros(len(self.num_examples), dtype=torch.bool)

    def poison(self, ids: Tensor, attack: Poison) -> None:
        targets = self.data.targets
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or int(targets.min()) < 0:
            raise ValueError("poisons labels, and the targets of this task are not all classes; choose another attack")
        attack.wanted(pick(self.data.inputs, slice(1)), targets[:1], self.data.num_classes)  # refuses what it can't do
        self._liars[ids] = True
        self._poison = attack

    def init(self, seed: int) -> Tensor:
        return self.x0.clone()

    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> BatchPlan:
        data, liars, read = self.data, self._liars[ids], self.read
        honest, staged = not bool(liars.any()), isinstance(read, Staged)
        # rows tell where a view begins, and a device would be waited for
        in_order = self.device.type == "cpu" and honest and not schedule.shuffle
        views = in_order and isinstance(data.inputs, Tensor) and self._may_view()

        def gather(step: int | None, k: int, columns: slice, weights: Tensor | None) -> Batch:
            rows = plan.rows[:k, columns]
            labels = read(data.targets, rows) if at_once is None else pick(at_once, (slice(k), columns))
            line = plan.lines[step] if views and step is not None else None
            if line is None:
                inputs = read(data.inputs, rows)
            else:
                inputs = _view(data.inputs, one(labels).shape[:2], *line)
            own = streams if k == len(ids) else streams.rows(slice(k))
            if not honest:
                inputs, labels = self._lies(inputs, labels, rows, liars[:k])
            return self.redrawn(Batch(inputs, labels, weights, own, step or 0, plan.counts(step, k)))

        def locate(positions: Tensor) -> Tensor:
            return data.rows(ids if staged else streams.clients, positions.to(data.order.device))

        plan = BatchPlan(self.num_examples[ids], schedule, streams, gather, locate)
        at_once = None
        if isinstance(data.targets, Tensor) and data.targets.ndim == 1:  # this takes no more than the rows themselves
            at_once = read(data.targets, plan.rows)
        return plan

    def redrawn(self, batch: Batch) -> Batch:
        """A minibatch with what a step draws anew of it; nothing here."""
        return batch

    def _lies(self, inputs: Tree, targets: Tree, rows: Tensor, liars: Tensor) -> tuple[Tree, Tree]:
        """A batch with samples at rows [k, B] poisoned for those of its clients that lie, [k] bool on the host."""
        attack = self._poison
        assert attack is not None and isinstance(targets, Tensor)
        lies, wanted = attack.wanted(inputs, targets, self.data.num_classes)
        drawn = as_uniform(mix64(rows + 1), torch.float64)  # a sample's own number
        which = ((drawn < attack.share) & liars.to(rows.device)[:, None]).to(targets.device)
        if lies is not inputs:
            assert isinstance(lies, Tensor) and isinstance(inputs, Tensor)
            inputs = torch.where(which.view(*which.shape, *[1] * (inputs.ndim - 2)), lies, inputs)
        return inputs, torch.where(which.view(*which.shape, *[1] * (targets.ndim - 2)), wanted, targets)

    def _may_view(self) -> bool:
        """Whether samples in their own order may be a view of the data set."""
        return self.engine.reads_only(pick(self.data.inputs, 0))

    def field(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.session(x).gradient(batch)

    def session(self, x: Tensor) -> Session:
        return self.engine.session(x)

    @property
    def _chain(self) -> Chain | None:
        return self.engine.chain if isinstance(self.data.inputs, Tensor) else None  # chains have one input

    def factored_run(self, x: Tensor, batches: BatchPlan, walk: Walk) -> tuple[LowRank, Tensor] | None:
        """See `Task`. Exact up to rounding, for chains of linear layers that see fewer samples than they are wide."""
        chain = self._chain
        if chain is None or not len(batches) or not chain.worthwhile(batches.samples * (1 + walk.less_start)):
            return None
        return low_rank_run(chain, self.layout, x, *batches.whole(), walk)

    def factored_gradients(self, x: Tensor, batches: BatchPlan) -> tuple[LowRank, Tensor] | None:
        chain = self._chain
        if chain is None or not len(batches):
            return None
        return gradients_at(chain, self.layout, x, *batches.whole())

    @cached_property
    def _program(self) -> Program:
        return Program(on_device(self.module, self.device), self.layout, self.sample_loss)

    def lacks(self, need: str) -> str | None:
        data = self.data
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        inputs, targets = (pick(self.read(part, slice(2)), None) for part in (data.inputs, data.targets))
        batch = Batch(inputs, targets, None, Streams(0, first, first))
        return self._program.lacks(need, self.x0[None].to(first.device), batch)

    def oracle(self, batch: Batch, buffers: Tensor) -> SamplesOracle:
        return SamplesOracle(self._program, batch, buffers)

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        data = self.data
        found = self._score(x, pool, held_out=True, keep=bool(self._wholes))
        if not found.parts.shape[-1]:
            return {}
        out = {f"test_{name}": float(v) for name, v in self._values(*_sums(found.parts)).items()}
        for name, metric in self._wholes.items():
            assert found.outputs is not None
            out[f"test_{name}"] = float(metric(found.outputs, each(Tensor.cpu, data.test_targets)))
        return out | self._attack_success(x, pool)

    def _attack_success(self, x: Tensor, pool: Pool) -> dict[str, float]:
        """Of held-out samples whose label is not the one that an attack on data wants, the share that is given it."""
        if self._poison is None:
            return {}
        found = pool.map(self._fooled, pieces(0, len(one(self.data.test_targets))), x=x)
        hits, count = torch.stack(found).sum(0).tolist()
        return {"test_attack_success": hits / count} if count else {}

    def _fooled(self, span: slice, x: Tensor) -> Tensor:
        """[2] of a piece of the held-out samples: how many x gives the wanted label, of those that have another."""
        attack, data = self._poison, self.data
        inputs, targets = self.read(data.test_inputs, span), self.read(data.test_targets, span)
        assert attack is not None and isinstance(targets, Tensor)
        shown, wanted = attack.wanted(each(Tensor.clone, inputs), targets, data.num_classes)
        with torch.no_grad():
            given = self.engine.logits(x, shown).argmax(-1)
        others = wanted != targets
        return torch.stack([((given == wanted) & others).sum(), others.sum()]).cpu()

    def evaluate_clients(self, x: Tensor, pool: Pool) -> dict[str, Tensor]:
        """[N] mean loss and metrics of the one model x [P] on every client's own training samples."""
        n, found = len(self.num_examples), self._score(x, pool, held_out=False)
        owner = torch.repeat_interleave(torch.arange(n), self.num_examples)
        sums = torch.zeros(*found.parts.shape[:2], n, dtype=torch.float64)
        for total, parts in zip(sums.flatten(0, 1), found.parts.flatten(0, 1), strict=True):
            total.index_add_(0, owner, parts)
        return self._values(*sums)

    def evaluate_own(self, ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        """See `Task`: mean loss and metrics, one client after the other."""
        assert self.held is not None
        ends, found = self.held.offsets.tolist(), []
        for i, own in zip(ids.tolist(), x, strict=True):
            spans = pieces(ends[i], ends[i + 1])
            parts = self._joined([self._scores(own, self.held.inputs, self.held.targets, s) for s in spans]).parts
            found.append({"examples": torch.tensor(parts.shape[-1])} | self._values(*_sums(parts)))
        return {name: torch.stack([row[name] for row in found]).double() for name in found[0]}

    def _values(self, totals: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """The loss and the metrics that are means, [] or [N], of sums [1 + M] or [1 + M, N]."""
        values = zip(self._means.items(), totals[1:], counts[1:], strict=True)
        return {"loss": totals[0] / counts[0]} | {name: m.value(total, count) for (name, m), total, count in values}

    def _score(self, x: Tensor, pool: Pool, *, held_out: bool, keep: bool = False) -> Scores:
        """What the held-out samples, or those of clients in their order, add to loss and metrics."""
        total = len(one(self.data.test_targets) if held_out else self.data.order)
        return self._joined(pool.map(self._piece, pieces(0, total), x=x, held_out=held_out, keep=keep))

    def _piece(self, span: slice, x: Tensor, held_out: bool, keep: bool) -> Scores:
        """The same of a piece of them."""
        data = self.data
        if held_out:
            return self._scores(x, data.test_inputs, data.test_targets, span, keep)
        return self._scores(x, data.inputs, data.targets, data.order[span])

    def _scores(self, x: Tensor, inputs: Tree, targets: Tree, which: slice | Tensor, keep: bool = False) -> Scores:
        """The same of some samples."""
        samples, aims = (self.read(part, which) for part in (inputs, targets))
        if isinstance(which, slice) and not self._may_view():  # a module may write to what it is given
            samples = each(Tensor.clone, samples)
        with torch.no_grad():
            outputs = self.engine.logits(x, samples)
            loss = per_sample(self.sample_loss(outputs, aims).double())
            parts = [(loss, torch.ones_like(loss)), *(m.parts(outputs, aims) for m in self._means.values())]
        both = torch.stack([torch.stack(each_kind) for each_kind in zip(*parts, strict=True)])
        return Scores(both, outputs.cpu() if keep else None)  # so few numbers wait on the device until all are there

    def _joined(self, found: Sequence[Scores]) -> Scores:
        if not found:
            return Scores(torch.zeros(2, 1 + len(self._means), 0, dtype=torch.float64), None)
        outputs = [f.outputs for f in found if f.outputs is not None]
        return Scores(torch.cat([f.parts.cpu() for f in found], -1), torch.cat(outputs) if outputs else None)


def _sums(parts: Tensor) -> Tensor:
    """[2, 1 + M] of [2, 1 + M, n]; row by row, since torch may add up several rows in another order."""
    return torch.stack([row.sum() for row in parts.flatten(0, 1)]).view(parts.shape[:2])


class Scores(NamedTuple):
    """What n samples add to a result.

    Args:
        parts: [2, 1 + M, n] float64: totals and counts of the loss and of metrics that are means.
        outputs: [n, ...], where they were asked for.
    """

    parts: Tensor
    outputs: Tensor | None


def pieces(start: int, end: int) -> list[slice]:
    """Samples cut at fixed places, so that no number of workers shows."""
    return [slice(i, min(i + EVALUATION_ROWS, end)) for i in range(start, end, EVALUATION_ROWS)]


def by_client(data: FederatedData) -> FederatedData:
    """The same data with each client's samples side by side in memory, so that gathering a batch reads in a row.

    Samples that nobody owns are dropped; data whose samples have several owners stay as they are, and so do data that
    memory has no room for twice (a file mapped into it): the same samples are then gathered from further apart.
    """
    order = data.order
    if not pages.room_for(sum(t.nbytes for t in tensors(data.inputs).values())):
        return data
    if len(torch.unique(order)) != len(order) or torch.equal(order, torch.arange(len(order), device=order.device)):
        return data
    inputs = each(lambda t: pages.take(t, order), data.inputs)
    targets = each(lambda t: t.index_select(0, order), data.targets)
    return replace(data, inputs=inputs, targets=targets, order=torch.arange(len(order), device=order.device))


def _view(pool: Tree, shape: Sequence[int], first: int, gap: int) -> Tensor:
    """The samples at rows[i, j] = first + i * gap + j of one tensor for `shape` [k, B], without a copy."""
    assert isinstance(pool, Tensor)
    sample, *inner = pool.stride()
    start = pool.storage_offset() + first * sample
    return pool.as_strided((*shape, *pool.shape[1:]), (gap * sample, sample, *inner), start)
