"""The gradient of any module on a stack, by torch.func.vmap over the clients; eager or compiled.

Letters: C clients, B samples, P entries of a client's vector.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from fedsim.config import first_line
from fedsim.engine.base import Batch
from fedsim.engine.functional import Tensors, ThreadModules, outputs_of
from fedsim.engine.losses import Loss, sample_shares
from fedsim.engine.noise import dropout_keys, start_calls
from fedsim.engine.precision import products
from fedsim.engine.twins import batchable_copy, share_names
from fedsim.params import Layout
from fedsim.trees import Tree


class Vmapped:
    """Gradients of a stack by one vmapped program; `compiled` passes it through torch.compile."""

    def __init__(self, module: nn.Module, layout: Layout, loss: Loss, precision: str, compiled: bool = False) -> None:
        self.layout = layout
        self.loss = loss
        self.precision = precision
        self.compiled = compiled
        self.tensors = Tensors(module, layout)
        self.modules = ThreadModules(module, batchable_copy)
        self._programs = threading.local()

    def gradient(self, x: Tensor, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Engine.session`."""
        module = self.modules.get(training=True)
        trained, buffers = self.tensors.of(x.detach())
        rows = x.new_empty(batch.rows)
        shares = sample_shares(batch.weights, rows).expand(rows.shape)
        extra = dropout_keys(module, batch.streams, batch.step) | {name: shares for name in share_names(module)}
        with torch.no_grad(), products(self.precision, x.device):
            grads, (loss, changed) = self._program(module)(trained, buffers, extra, batch.inputs, batch.targets, shares)
        out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        for name, view in self.layout.views(out).items():
            if name in grads:
                view.copy_(grads[name])
            else:
                view.zero_()
        self.tensors.write_back_(x, changed, None if batch.weights is None else shares.sum(1) > 0)
        return out, loss

    def gradient_or(
        self, instead: Callable[[], tuple[Tensor, Tensor]], x: Tensor, batch: Batch, out: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], Exception | None]:
        """(`gradient`, None), or where that fails (what `instead` gives for the same x, why it failed)."""
        tail = x[:, self.layout.num_trainable :]
        before = tail.clone()
        try:
            return self.gradient(x, batch, out), None
        except Exception as error:  # a user's module may fail under vmap or the compiler in any way
            tail.copy_(before)
            return instead(), error  # if this fails too, it raises: then the way to compute is not the matter

    def _program(self, module: nn.Module) -> Callable[..., Any]:
        """This thread's program for its own copy of the module."""
        found = getattr(self._programs, "program", None)
        if found is None:
            found = vmap(grad_and_value(self._client_loss(module), has_aux=True))
            if self.compiled:
                found = torch.compile(found, dynamic=False)
            self._programs.program = found
        return found

    def _client_loss(self, module: nn.Module) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        def client_loss(
            trained: dict[str, Tensor],
            buffers: dict[str, Tensor],
            extra: dict[str, Tensor],
            inputs: Tree,
            targets: Tree,
            shares: Tensor,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            start_calls(module)
            tensors = trained | buffers | extra
            logits = outputs_of(module, tensors, inputs)
            losses = self.loss(logits.to(shares.dtype), targets)
            # the call leaves new values of changed buffers in the dictionary it was given
            return (losses * shares).sum(), {name: tensors[name] for name in buffers}

        return client_loss


def warn_of_change(module: nn.Module, what: str, error: Exception) -> None:
    """Says what becomes of a module that could not be computed as asked, and why."""
    warnings.warn(f"{type(module).__name__} {what}: {first_line(error)}", stacklevel=5)
