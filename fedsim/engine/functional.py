"""What the autograd engines share: a module called as a function of a client's vector.

`torch.func.functional_call` swaps tensors into the module itself, so every thread works on its own copy.

Letters: C clients, B samples, P entries of a client's vector.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsim.engine.noise import keyed_copy
from fedsim.params import Layout, program_of


class ThreadModules:
    """One keyed copy of a module per thread, in training or in evaluation mode."""

    def __init__(self, module: nn.Module, change: Callable[[nn.Module], nn.Module] = keyed_copy) -> None:
        self._source = change(module)
        self._local = threading.local()

    def get(self, training: bool) -> nn.Module:
        """This thread's copy, switched to the mode asked for."""
        found = getattr(self._local, "module", None)
        if found is None:
            found = self._local.module = program_of(self._source)
        return found.train(training) if found.training != training else found


class Tensors:
    """Moves between a flat vector and the tensors that a module expects, in the module's own dtypes."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        self.layout = layout
        self.trained = layout.trainable.names
        self.integers = {k: own[k].dtype for k in layout.names if not own[k].is_floating_point()}

    def of(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(parameters, buffers) of x [..., P]: views, save for integer buffers, which are rounded copies."""
        views = self.layout.views(x)
        trained = {k: views.pop(k) for k in self.trained}
        return trained, {k: v.round().to(self.integers[k]) if k in self.integers else v for k, v in views.items()}

    def write_back_(self, x: Tensor, buffers: dict[str, Tensor], active: Tensor | None = None) -> None:
        """Writes buffers to the tail of x [..., P]; only in the rows where `active` [...] holds."""
        for name, view in self.layout.views(x).items():
            if name in buffers and buffers[name].data_ptr() != view.data_ptr():
                value = buffers[name].to(view.dtype)
                view.copy_(value if active is None else torch.where(_like(active, value), value, view))


def _like(active: Tensor, value: Tensor) -> Tensor:
    return active.view(*active.shape, *(1 for _ in range(value.ndim - active.ndim)))
