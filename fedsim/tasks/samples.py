"""What a module on samples with labels supplies to optimizers beside a gradient: losses, curvature, private sums.

All of them are one vmapped program over the clients of a stack. Losses are taken in evaluation mode; the others are of
the very function whose gradient is taken, in training mode with the step's own dropout. Products are in fp32 whatever
the engine's precision.

Letters: k clients, B samples of a batch (padded to the largest), P entries of a client's vector, n of them trained,
q points of each client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap

from fedsim.config import first_line
from fedsim.engine.base import Batch
from fedsim.engine.functional import outputs_of
from fedsim.engine.losses import Loss, cross_entropy, sample_shares
from fedsim.engine.noise import dropout_keys, start_calls
from fedsim.engine.stacked import StackedEngine
from fedsim.engine.twins import share_names
from fedsim.optim.needs import sample_factors
from fedsim.params import Layout
from fedsim.streams import mix64
from fedsim.trees import Tree, one, pick

CHUNK = 1 << 24  # entries of per-sample gradients alive at once: 64 MiB in float32
Named = dict[str, Tensor]


class Program:
    """A module in the form that vmap can carry, a copy for each thread.

    Args:
        module: maps inputs [B, ...] to logits.
        layout: of its parameters and buffers.
        sample_loss: (logits, targets) -> [B] losses.
    """

    def __init__(self, module: nn.Module, layout: Layout, sample_loss: Loss) -> None:
        self.module, self.layout, self.sample_loss = module, layout, sample_loss
        self.engine = StackedEngine(module, layout, sample_loss)  # for its tape, in fp32
        self.modules, self.tensors = self.engine.vmapped.modules, self.engine.vmapped.tensors

    def __reduce__(self) -> tuple[object, ...]:
        return Program, (self.module, self.layout, self.sample_loss)

    def lacks(self, need: str, x: Tensor, batch: Batch) -> str | None:
        """Why the module cannot supply a need; None if it can, which is tried on one client x [1, P]."""
        batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.module.modules())
        if need == "per_sample_norms" and batch_norm:
            return "BatchNorm mixes the samples of a batch, so they have no gradients of their own (take GroupNorm)"
        if need == "sampled_grad" and self.sample_loss is not cross_entropy:
            return "labels can be drawn from the model's predictions only where the loss is cross_entropy"
        n = self.layout.num_trainable
        oracle, x = SamplesOracle(self, batch, x[:, n:]), x[:, :n]
        calls: dict[str, Callable[[], Tensor]] = {
            "loss_eval": lambda: oracle.losses(x[None]),
            "sampled_grad": lambda: oracle.sampled_grad(x),
            "hvp": lambda: oracle.hvp(x, x),
            "per_sample_norms": lambda: oracle.clipped_sum(x, x.new_ones(1)),
        }
        try:
            calls[need]()
        except Exception as error:  # a user's module may fail under vmap in any way
            return f"{type(self.module).__name__} cannot be batched for it ({first_line(error)})"
        return None


class SamplesOracle:
    """See `fedsim.task.Oracle`; for any module that torch.func.vmap can carry.

    Args:
        program: of the module.
        batch: of k clients.
        buffers: [k, P - n], the clients' buffers; they are read, not updated.
    """

    def __init__(self, program: Program, batch: Batch, buffers: Tensor) -> None:
        self.program, self.batch, self.buffers = program, batch, buffers
        self.loss: Tensor | None = None

    def batch_sizes(self) -> Tensor:
        weights, (clients, width) = self.batch.weights, self.batch.rows
        if weights is not None:
            return weights.sum(1)
        return torch.full((clients,), width, device=one(self.batch.targets).device)

    def num_labels(self) -> Tensor:
        return self.batch_sizes() * one(self.batch.targets)[0, 0].numel()

    def losses(self, points: Tensor) -> Tensor:
        """[q, k] mean losses at points [q, k, n], in evaluation mode."""
        module, batch = self.program.modules.get(training=False), self.batch
        _, shares = self._shares(points)

        def client(trained: Named, buffers: Named, inputs: Tree, targets: Tree, shares: Tensor) -> Tensor:
            return (self._sample_losses(module, trained | buffers, inputs, targets, shares) * shares).sum()

        each = vmap(client)
        _, buffers = self._split(points[0])
        with torch.no_grad():
            found = vmap(lambda trained: each(trained, buffers, batch.inputs, batch.targets, shares))(
                self.program.layout.trainable.views(points)
            )
        self.loss = found.mean(0)
        return found

    def sampled_grad(self, x: Tensor) -> Tensor:
        """[k, n] at labels drawn from the model's own predictions, keyed by client, job, step and sample."""
        streams, targets = self.batch.streams, self.batch.targets
        assert streams is not None and isinstance(targets, Tensor)
        uniform = streams.uniform("optimizer labels", *targets.shape[1:], step=self.batch.step).to(x.device)

        def loss(module: nn.Module, tensors: Named, inputs: Tree, targets: Tree, shares: Tensor, u: Tensor) -> Tensor:
            start_calls(module)
            logits = outputs_of(module, tensors, inputs).to(shares.dtype)
            below = logits.detach().softmax(-1).cumsum(-1) < u.to(logits.dtype).unsqueeze(-1)
            drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
            return (self.program.sample_loss(logits, drawn) * shares).sum()

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
        whole = torch.cat([x, self.buffers.to(x)], dim=1) if self.program.layout.num_buffers else x
        session = self.program.engine.session(whole)
        found = session.weighted_sum(self.batch, lambda norms: sample_factors(norms, bounds))
        if found is None:
            return None
        total, self.loss = found
        return total[:, : x.shape[1]]

    def _clipped_by_samples(self, x: Tensor, bounds: Tensor) -> Tensor:
        """Any module: gradients of a chunk of samples at a time; each sample has dropout of its own."""
        module, batch = self.program.modules.get(training=True), self.batch
        trained, buffers = self._split(x)
        counted, shares = self._shares(x)
        keys = self._sample_keys(module, batch.rows[1])
        share = x.new_ones(1)

        def sample(trained: Named, buffers: Named, keys: Named, inputs: Tree, targets: Tree) -> tuple[Named, Tensor]:
            def loss(trained: Named) -> Tensor:
                tensors = trained | buffers | keys
                return self._sample_losses(module, tensors, pick(inputs, None), pick(targets, None), share).sum()

            return grad_and_value(loss)(trained)

        program = vmap(vmap(sample, in_dims=(None, None, 0, 0, 0)))
        total, losses = x.new_zeros(x.shape), []
        views = self.program.layout.trainable.views(total)
        chunk = max(1, CHUNK // x.numel())
        for i in range(0, batch.rows[1], chunk):
            some = slice(i, i + chunk)
            own = {name: key[:, some] for name, key in keys.items()}
            with torch.no_grad():
                inputs, targets = (pick(part, (slice(None), some)) for part in (batch.inputs, batch.targets))
                grads, found = program(trained, buffers, own, inputs, targets)
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
        module, batch = self.program.modules.get(training=True), self.batch
        trained, buffers = self._split(x)
        _, shares = self._shares(x)
        extra = dropout_keys(module, batch.streams, batch.step) | {name: shares for name in share_names(module)}
        tangents = [] if along is None else [self.program.layout.trainable.views(along)]

        def client(
            trained: Named, tangents: list[Named], others: Named, inputs: Tree, targets: Tree, *rest: Tensor
        ) -> Named:
            # a copy of the tensors: BatchNorm leaves its new statistics in the dictionary it is given
            program = transform(lambda own: loss(module, {**others, **own}, inputs, targets, *rest))
            return program(trained, *tangents)

        with torch.no_grad():
            return vmap(client)(trained, tangents, buffers | extra, batch.inputs, batch.targets, shares, *more)

    def _mean_loss(self, module: nn.Module, tensors: Named, inputs: Tree, targets: Tree, shares: Tensor) -> Tensor:
        return (self._sample_losses(module, tensors, inputs, targets, shares) * shares).sum()

    def _sample_losses(self, module: nn.Module, tensors: Named, inputs: Tree, targets: Tree, like: Tensor) -> Tensor:
        """[B] of one client."""
        start_calls(module)
        return self.program.sample_loss(outputs_of(module, tensors, inputs).to(like.dtype), targets)

    def _split(self, x: Tensor) -> tuple[Named, Named]:
        """(trained tensors of x [k, n], the clients' buffers)."""
        layout = self.program.layout
        trained = layout.trainable.views(x)
        if not layout.num_buffers:
            return trained, {}
        return trained, self.program.tensors.of(torch.cat([x, self.buffers.to(x)], dim=1))[1]

    def _shares(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """([k, B] 1 for samples and 0 for padding, [k, B] each one's share of its client's mean)."""
        weights = self.batch.weights
        counted = like.new_ones(self.batch.rows) if weights is None else weights.to(like)
        return counted, sample_shares(counted, counted)

    def _sample_keys(self, module: nn.Module, num_samples: int) -> Named:
        """{dropout key: [k, B]}."""
        index = torch.arange(1, num_samples + 1)
        keys = dropout_keys(module, self.batch.streams, self.batch.step)
        return {name: mix64(key[:, None] + index.to(key.device)) for name, key in keys.items()}

    def _flat(self, tensors: Named) -> Tensor:
        return torch.cat([tensors[name].flatten(1) for name in self.program.layout.trainable.names], dim=1)
