"""The plain engine: autograd, one client after another. It carries any module and is the others' oracle.

Letters: C clients in the stack, B samples of a minibatch, P entries of a client's vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsim.engine.base import Batch
from fedsim.engine.functional import Tensors, ThreadModules, outputs_of
from fedsim.engine.losses import Loss, sample_shares
from fedsim.engine.noise import TorchNumbers, dropout_keys, start_calls
from fedsim.engine.precision import products
from fedsim.engine.protocol import Engine
from fedsim.params import Layout
from fedsim.task import PlainSession, Session
from fedsim.trees import Tree, pick


class LoopEngine(Engine):
    """Plain autograd, one client after another: any module.

    Padded rows are cut off, so each client's module sees its own samples and nothing else.
    """

    name = "loop"

    def __init__(self, module: nn.Module, layout: Layout, loss: Loss, precision: str = "fp32") -> None:
        self.module = module
        self.layout = layout
        self.loss = loss
        self.precision = precision
        self.tensors = Tensors(module, layout)
        self.modules = ThreadModules(module)
        self.numbers = TorchNumbers()

    def __reduce__(self) -> tuple[object, ...]:
        return LoopEngine, (self.module, self.layout, self.loss, self.precision)

    def session(self, x: Tensor) -> Session:
        return PlainSession(self._gradient, x)

    def logits(self, x: Tensor, inputs: Tree) -> Tensor:
        module = self.modules.get(training=False)
        trained, buffers = self.tensors.of(x)
        with torch.no_grad(), products(self.precision, x.device):
            return outputs_of(module, trained | buffers, inputs).to(x.dtype)

    def _gradient(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        module = self.modules.get(training=True)
        keys = dropout_keys(module, batch.streams, batch.step)
        counts = _num_samples(batch)
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        losses = []
        for i, seed in enumerate(self.numbers.seeds(batch.streams, batch.step, len(x))):
            own_keys = {name: k[i] for name, k in keys.items()}
            with self.numbers.seeded(seed, x.device):
                losses.append(self._client(module, x[i], out[i], batch, i, counts[i], own_keys))
        return out, torch.stack(losses)

    def _client(
        self, module: nn.Module, x: Tensor, out: Tensor, batch: Batch, i: int, n: int, keys: dict[str, Tensor]
    ) -> Tensor:
        """Writes client i's gradient to out [P], its buffers to x [P], and returns its loss."""
        if n == 0:
            return x.new_zeros(())

        own = (i, slice(n))
        start_calls(module)
        trained, buffers = self.tensors.of(x.detach())
        leaves = {k: v.requires_grad_() for k, v in trained.items()}
        # copies: views of one storage share a version counter, so autograd would take a new mean for a new weight
        buffers = {k: v.clone() for k, v in buffers.items()}
        with torch.enable_grad(), products(self.precision, x.device):
            logits = outputs_of(module, leaves | buffers | keys, pick(batch.inputs, own))
            losses = self.loss(logits.to(x.dtype), pick(batch.targets, own))
            shares = sample_shares(None if batch.weights is None else batch.weights[i, :n], losses)
            loss = (losses * shares).sum()
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for view, grad in zip(self.layout.views(out).values(), grads, strict=False):
            if grad is not None:
                view.copy_(grad)
        self.tensors.write_back_(x, buffers)
        return loss.detach()


def _num_samples(batch: Batch) -> Sequence[int]:
    """How many leading rows of each client hold samples; a device is asked only if nobody has counted them."""
    clients, width = batch.rows
    if batch.weights is None:
        return [width] * clients
    if batch.counts is not None:
        return batch.counts
    position = torch.arange(1, width + 1, device=batch.weights.device)
    found: list[int] = (position * (batch.weights > 0)).amax(1).tolist()
    return found
