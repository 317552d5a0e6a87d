"""What the autograd engines share: a module called as a function of a client's vector.

`torch.func.functional_call` swaps tensors into the module itself, so every thread works on its own copy. What is frozen
is not swapped: it is one tensor for all clients and all threads, under torch.func.vmap without a client axis.

Letters: C clients, B samples, P entries of a client's vector.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from fedsim.engine.noise import FUNCTIONAL, KeyedFunctions, keyed_copy
from fedsim.params import Layout, moving_buffers, program_of
from fedsim.trees import Tree


class ThreadModules:
    """One keyed copy of a module per thread, in training or in evaluation mode."""

    def __init__(self, module: nn.Module, change: Callable[[nn.Module], nn.Module] = keyed_copy) -> None:
        self._source = change(module)
        self._still = still_norms(self._source)
        self._local = threading.local()

    def get(self, training: bool) -> nn.Module:
        """This thread's copy, switched to the mode asked for."""
        found = getattr(self._local, "module", None)
        if found is None:
            found = self._local.module = switch(program_of(self._source), training, self._still)
        return switch(found, training, self._still) if found.training != training else found


def switch(module: nn.Module, training: bool, still: Sequence[str]) -> nn.Module:
    """The module in training or in evaluation mode, in which the layers `still` are in any case.

    Otherwise BatchNorm in a frozen part would use each minibatch's own statistics, and the model would change.
    """
    module.train(training)
    for path in still:
        module.get_submodule(path).training = False
    return module


def still_norms(module: nn.Module) -> list[str]:
    """Names of the layers that keep running statistics which no training changes."""
    moving = moving_buffers(module)
    tracks = [k for k, m in module.named_modules() if isinstance(m, _NormBase) and m.track_running_stats]
    return [k for k in tracks if (f"{k}.running_mean" if k else "running_mean") not in moving]


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


def called(module: nn.Module, tensors: dict[str, Tensor], inputs: Tree) -> Any:
    """What a module gives for inputs [B, ...], with other tensors in place of its own; a dictionary gives keywords.

    A key among the tensors (`dropout_keys`) is taken out of them, and functional dropout keyed by it.
    """
    key = tensors.pop(FUNCTIONAL, None)
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs)
    with nullcontext() if key is None else KeyedFunctions(key):
        return functional_call(module, tensors, args, kwargs)


def outputs_of(module: nn.Module, tensors: dict[str, Tensor], inputs: Tree) -> Tensor:
    """The tensor in what a module gives, see `called` and `tensor_of`."""
    return tensor_of(called(module, tensors, inputs))


def tensor_of(made: Any) -> Tensor:
    """The tensor that losses and metrics see: of a tuple the first entry, of a dictionary (ModelOutput) its `logits`.

    Raises:
        ValueError: if there is none.
    """
    found = made
    if isinstance(made, Mapping):
        found = made.get("logits")
    elif isinstance(made, Sequence) and len(made):
        found = made[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model gives a {type(made).__name__}; return a tensor, a tuple that begins with one, or a dictionary "
            "with one under 'logits'"
        )
    return found


def _like(active: Tensor, value: Tensor) -> Tensor:
    return active.view(*active.shape, *(1 for _ in range(value.ndim - active.ndim)))
