"""What tasks supply to optimizers beside a gradient (`fedsim.optim.needs`): losses, curvature, private sums.

A source is one minibatch of a stack, as functions of the clients' points. For a module all of them are one vmapped
program over the clients. Losses are taken in evaluation mode; the others are of the very function whose gradient is
taken, in training mode with the step's own dropout. Products are in fp32 whatever the engine's precision.

Letters: k clients, B samples of a batch (padded to the largest), P entries of a client's vector, n of them trained,
q points of each client.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from fedsim.engine.base import Batch
from fedsim.engine.functional import Tensors, ThreadModules
from fedsim.engine.losses import cross_entropy, sample_shares
from fedsim.engine.noise import dropout_keys, start_calls
from fedsim.engine.stacked import StackedEngine
from fedsim.engine.twins import batchable_copy, share_names
from fedsim.optim import Optimizer
from fedsim.optim.needs import SuppliesNeeds, clip_and_sum, sample_factors
from fedsim.optim.segments import Segments
from fedsim.streams import mix64
from fedsim.task import Task, stream_of
from fedsim.tasks.bilinear import BilinearTask, SaddleBatch
from fedsim.tasks.classification import ClassificationTask
from fedsim.tasks.quadratic import QuadraticBatch, QuadraticTask

CHUNK = 1 << 24  # entries of per-sample gradients alive at once: 64 MiB in float32
Named = dict[str, Tensor]


def source(task: Task, batch: Any, buffers: Tensor) -> SuppliesNeeds:
    """The source of one minibatch; for tasks and needs that `check` let pass.

    Args:
        task: one of `SOURCES`, or derived from one.
        batch: of k clients, in the task's own form.
        buffers: [k, P - n], the clients' buffers; they are read, not updated.
    """
    found = _source_type(task)
    assert found is not None, "check(task, optimizer) comes first"
    return found(task, batch, buffers)


def check(task: Task, optimizer: Optimizer) -> None:
    """Refuse an optimizer whose needs the task cannot supply.

    Raises:
        ValueError: naming what is missing, and why where there is more to say.
    """
    if not optimizer.needs - {"grad"}:
        return
    found = _source_type(task)
    if found is None:
        optimizer.check_needs({"grad"})
        return
    for need in sorted(optimizer.needs & found.available):
        why = found.lacks(task, need)
        if why is not None:
            raise ValueError(f"optimizer {optimizer.spec.get('name')!r} needs {need}, but {why}; choose another rule")
    optimizer.check_needs({"grad"} | found.available)


class SamplesSource:
    """Any module that torch.func.vmap can carry, on samples with labels."""

    available = frozenset({"loss_eval", "sampled_grad", "hvp", "per_sample_norms"})

    def __init__(self, task: ClassificationTask, batch: Batch, buffers: Tensor) -> None:
        self.task, self.batch, self.buffers = task, batch, buffers
        self.model = _model_of(task)
        self.loss: Tensor | None = None

    @staticmethod
    def lacks(task: ClassificationTask, need: str) -> str | None:
        """Why this task cannot supply a need; None if it can, which is tried on two samples."""
        batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in task.module.modules())
        if need == "per_sample_norms" and batch_norm:
            return "BatchNorm mixes the samples of a batch, so they have no gradients of their own (take GroupNorm)"
        if need == "sampled_grad" and task.sample_loss is not cross_entropy:
            return "labels can be drawn from the model's predictions only where the loss is cross_entropy"
        data, n = task.data, task.layout.num_trainable
        x = task.x0[None].to(data.inputs.device)
        one = torch.zeros(1, dtype=torch.int64, device=x.device)
        batch = Batch(data.inputs[None, :2], data.targets[None, :2], None, stream_of(one, 0))
        tried = SamplesSource(task, batch, x[:, n:])
        try:
            tried._try(need, x[:, :n])
        except Exception as error:  # a user's module may fail under vmap in any way
            reason = (str(error).strip().splitlines() or [""])[0]
            return f"{type(task.module).__name__} cannot be batched for it ({type(error).__name__}: {reason})"
        return None

    def _try(self, need: str, x: Tensor) -> None:
        calls: dict[str, Callable[[], Tensor]] = {
            "loss_eval": lambda: self.losses(x[None]),
            "sampled_grad": lambda: self.sampled_grad(x),
            "hvp": lambda: self.hvp(x, x),
            "per_sample_norms": lambda: self.clipped_sum(x, x.new_ones(1)),
        }
        calls[need]()

    def batch_sizes(self) -> Tensor:
        return self.task.batch_sizes(self.batch)

    def num_labels(self) -> Tensor:
        return self.batch_sizes() * self.batch.targets[0, 0].numel()

    def losses(self, points: Tensor) -> Tensor:
        """[q, k] mean losses at points [q, k, n], in evaluation mode."""
        module, batch = self.model.modules.get(training=False), self.batch
        _, shares = self._shares(points)

        def client(trained: Named, buffers: Named, inputs: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
            return (self._sample_losses(module, trained | buffers, inputs, targets, shares) * shares).sum()

        each = vmap(client)
        _, buffers = self._split(points[0])
        with torch.no_grad():
            found = vmap(lambda trained: each(trained, buffers, batch.inputs, batch.targets, shares))(
                self.task.layout.trainable.views(points)
            )
        self.loss = found.mean(0)
        return found

    def sampled_grad(self, x: Tensor) -> Tensor:
        """[k, n] at labels drawn from the model's own predictions, keyed by client, job, step and sample."""
        streams, targets = self.batch.streams, self.batch.targets
        assert streams is not None
        uniform = streams.uniform("optimizer labels", *targets.shape[1:], step=self.batch.step).to(x.device)

        def loss(
            module: nn.Module, tensors: Named, inputs: Tensor, targets: Tensor, shares: Tensor, u: Tensor
        ) -> Tensor:
            start_calls(module)
            logits = functional_call(module, tensors, (inputs,)).to(shares.dtype)
            below = logits.detach().softmax(-1).cumsum(-1) < u.to(logits.dtype).unsqueeze(-1)
            drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
            return (self.task.sample_loss(logits, drawn) * shares).sum()

        return self._flat(self._over_clients(x, lambda f: grad(f), loss, uniform))

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """[k, n], the gradient of the gradient along v."""

        # reverse over reverse: every layer has a second backward pass, not every one a forward derivative
        def product(f: Callable[[Named], Tensor]) -> Callable[[Named, Named], Named]:
            def slope(trained: Named, along: Named) -> Tensor:
                g = grad(f)(trained)
                return torch.stack([(g[name] * along[name]).sum() for name in g]).sum()

            return grad(slope)

        return self._flat(self._over_clients(x, product, self._mean_loss, along=v))

    def clipped_sum(self, x: Tensor, bounds: Tensor) -> Tensor:
        """[k, n] sum of clipped gradients of samples: from what layers leave where the module has a tape."""
        found = self._clipped_by_layers(x, bounds)
        return self._clipped_by_samples(x, bounds) if found is None else found

    def _clipped_by_layers(self, x: Tensor, bounds: Tensor) -> Tensor | None:
        """One pass of the stack, with the dropout of an ordinary gradient; None without a tape."""
        whole = torch.cat([x, self.buffers.to(x)], dim=1) if self.task.layout.num_buffers else x
        session = self.model.engine.session(whole)
        found = session.weighted_sum(self.batch, lambda norms: sample_factors(norms, bounds))
        if found is None:
            return None
        total, self.loss = found
        return total[:, : x.shape[1]]

    def _clipped_by_samples(self, x: Tensor, bounds: Tensor) -> Tensor:
        """Any module: gradients of a chunk of samples at a time; each sample has dropout of its own."""
        module, batch = self.model.modules.get(training=True), self.batch
        trained, buffers = self._split(x)
        counted, shares = self._shares(x)
        keys = self._sample_keys(module, batch.inputs.shape[1])
        one = x.new_ones(1)

        def sample(
            trained: Named, buffers: Named, keys: Named, inputs: Tensor, targets: Tensor
        ) -> tuple[Named, Tensor]:
            def loss(trained: Named) -> Tensor:
                tensors = trained | buffers | keys
                return self._sample_losses(module, tensors, inputs[None], targets[None], one).sum()

            return grad_and_value(loss)(trained)

        program = vmap(vmap(sample, in_dims=(None, None, 0, 0, 0)))
        total, losses = x.new_zeros(x.shape), []
        views = self.task.layout.trainable.views(total)
        chunk = max(1, CHUNK // x.numel())
        for i in range(0, batch.inputs.shape[1], chunk):
            some = slice(i, i + chunk)
            own = {name: key[:, some] for name, key in keys.items()}
            with torch.no_grad():
                grads, found = program(trained, buffers, own, batch.inputs[:, some], batch.targets[:, some])
            norms = torch.stack([g.flatten(2).square().sum(-1) for g in grads.values()], -1)
            factors = sample_factors(norms, bounds) * counted[:, some, None]
            for j, (name, g) in enumerate(grads.items()):
                views[name] += torch.einsum("kb,kb...->k...", factors[..., j], g)
            losses.append(found)
        self.loss = (torch.cat(losses, 1) * shares).sum(1)
        return total

    def _over_clients(
        self,
        x: Tensor,
        transform: Callable[[Callable[[Named], Tensor]], Callable[..., Any]],
        loss: Callable[..., Tensor],
        *more: Tensor,
        along: Tensor | None = None,
    ) -> Named:
        """transform(loss as a function of the trained tensors), at every client's own tensors; {name: [k, ...]}."""
        module, batch = self.model.modules.get(training=True), self.batch
        trained, buffers = self._split(x)
        _, shares = self._shares(x)
        extra = dropout_keys(module, batch.streams, batch.step) | {name: shares for name in share_names(module)}
        tangents = [] if along is None else [self.task.layout.trainable.views(along)]

        def client(
            trained: Named, tangents: list[Named], others: Named, inputs: Tensor, targets: Tensor, *rest: Tensor
        ) -> Named:
            # a copy of the tensors: BatchNorm leaves its new statistics in the dictionary it is given
            program = transform(lambda own: loss(module, {**others, **own}, inputs, targets, *rest))
            return program(trained, *tangents)

        with torch.no_grad():
            return vmap(client)(trained, tangents, buffers | extra, batch.inputs, batch.targets, shares, *more)

    def _mean_loss(self, module: nn.Module, tensors: Named, inputs: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        return (self._sample_losses(module, tensors, inputs, targets, shares) * shares).sum()

    def _sample_losses(
        self, module: nn.Module, tensors: Named, inputs: Tensor, targets: Tensor, like: Tensor
    ) -> Tensor:
        """[B] of one client."""
        start_calls(module)
        return self.task.sample_loss(functional_call(module, tensors, (inputs,)).to(like.dtype), targets)

    def _split(self, x: Tensor) -> tuple[Named, Named]:
        """(trained tensors of x [k, n], the clients' buffers)."""
        layout = self.task.layout
        trained = layout.trainable.views(x)
        if not layout.num_buffers:
            return trained, {}
        return trained, self.model.tensors.of(torch.cat([x, self.buffers.to(x)], dim=1))[1]

    def _shares(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """([k, B] 1 for samples and 0 for padding, [k, B] each one's share of its client's mean)."""
        weights = self.batch.weights
        counted = like.new_ones(self.batch.inputs.shape[:2]) if weights is None else weights.to(like)
        return counted, sample_shares(counted, counted)

    def _sample_keys(self, module: nn.Module, num_samples: int) -> Named:
        """{dropout key: [k, B]}."""
        index = torch.arange(1, num_samples + 1)
        keys = dropout_keys(module, self.batch.streams, self.batch.step)
        return {name: mix64(key[:, None] + index.to(key.device)) for name, key in keys.items()}

    def _flat(self, tensors: Named) -> Tensor:
        return torch.cat([tensors[name].flatten(1) for name in self.task.layout.trainable.names], dim=1)


class FormulaSource:
    """Quadratic clients: one function each, which is its one sample."""

    available = frozenset({"loss_eval", "hvp", "per_sample_norms"})

    def __init__(self, task: QuadraticTask, batch: QuadraticBatch, buffers: Tensor) -> None:
        self.task, self.batch = task, batch
        self.loss: Tensor | None = None

    @staticmethod
    def lacks(task: QuadraticTask, need: str) -> str | None:
        """None: everything in `available` is a formula."""
        return None

    def batch_sizes(self) -> Tensor:
        return self.task.batch_sizes(self.batch)

    def num_labels(self) -> Tensor:
        raise AssertionError("a quadratic has no labels")

    def losses(self, points: Tensor) -> Tensor:
        """[q, k]; the noise of a batch is a linear term of its loss, so that the gradient of the loss is the field."""
        found = torch.stack([self.task.field(x, self.batch)[1] for x in points])
        self.loss = found.mean(0)
        if self.task.noise:
            slope = self.batch.streams.normal("noise", points.shape[2], step=self.batch.step).to(points)
            found = found + self.task.noise * (points * slope).sum(-1)
        return found

    def sampled_grad(self, x: Tensor) -> Tensor:
        raise AssertionError("a quadratic has no labels")

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """[k, P]: A v."""
        a = self.task.a[self.batch.rows].to(v)
        return a * v if a.ndim == 2 else torch.einsum("kij,kj->ki", a, v)

    def clipped_sum(self, x: Tensor, bounds: Tensor) -> Tensor:
        gradient, self.loss = self.task.field(x, self.batch)
        return clip_and_sum(gradient[:, None], bounds, Segments.of(self.task.layout))


class SaddleSource:
    """Saddle points: curvature is the Jacobian of the operator. Losses are not supplied, for nobody minimises them."""

    available = frozenset({"hvp", "per_sample_norms"})

    def __init__(self, task: BilinearTask, batch: SaddleBatch, buffers: Tensor) -> None:
        self.task, self.batch = task, batch
        self.loss: Tensor | None = None

    @staticmethod
    def lacks(task: BilinearTask, need: str) -> str | None:
        """None: everything in `available` is a formula."""
        return None

    def batch_sizes(self) -> Tensor:
        return self.task.batch_sizes(self.batch)

    def num_labels(self) -> Tensor:
        raise AssertionError("a saddle point has no labels")

    def losses(self, points: Tensor) -> Tensor:
        raise AssertionError("a saddle point is not minimised")

    def sampled_grad(self, x: Tensor) -> Tensor:
        raise AssertionError("a saddle point has no labels")

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        """[k, P]: J v."""
        a, lam, (p, q) = self.task.matrix[self.batch.rows].to(v), self.task.lam, v.chunk(2, dim=1)
        av, ap = torch.einsum("kij,kj->ki", a, q), torch.einsum("kij,ki->kj", a, p)
        return torch.cat([lam * p + av, lam * q - ap], dim=1)

    def clipped_sum(self, x: Tensor, bounds: Tensor) -> Tensor:
        operator, self.loss = self.task.field(x, self.batch)
        return clip_and_sum(operator[:, None], bounds, Segments.of(self.task.layout))


SOURCES: dict[type, Any] = {
    ClassificationTask: SamplesSource,
    QuadraticTask: FormulaSource,
    BilinearTask: SaddleSource,
}


def _source_type(task: Task) -> Any:
    """A row of `SOURCES` for the task's class or the nearest that it derives from; None if there is none."""
    return next((SOURCES[c] for c in type(task).__mro__ if c in SOURCES), None)


class _Model:
    """A task's module in the form that vmap can carry, a copy for each thread."""

    def __init__(self, task: ClassificationTask) -> None:
        module = copy.deepcopy(task.module).to(task.data.inputs.device)
        self.modules = ThreadModules(module, batchable_copy)
        self.tensors = Tensors(module, task.layout)
        self.engine = StackedEngine(module, task.layout, task.sample_loss)  # for its tape, in fp32


_MODELS: WeakKeyDictionary[ClassificationTask, _Model] = WeakKeyDictionary()


def _model_of(task: ClassificationTask) -> _Model:
    found = _MODELS.get(task)
    if found is None:  # two threads may both make one; either serves
        found = _MODELS[task] = _Model(task)
    return found
