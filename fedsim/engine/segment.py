"""Any functions of torch on a stack: recorded calls, one after another, by autograd on these alone.

Calls without parameters see the samples of all clients as one batch; calls with parameters are batched over the clients
by torch.func.vmap.

Letters: C clients, B samples. A slot of a tape has the samples in front, [C, B, ...]; a module may have them elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from fedsim.engine.calls import Place, Ref, Size, mapped
from fedsim.engine.ops import Bound, Local, Spec, by_client


@dataclass(frozen=True)
class Step:
    """One call, with `Ref`s to values and `Size`s among its arguments.

    Args:
        function, args, kwargs: of the call.
        changed: which argument is changed in place and is what the call gives; here a copy of it is.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    changed: int | None = None

    def __call__(self, values: list[Any], size: int) -> Any:
        args = [_filled(values, size, given) for given in self.args]
        kwargs = {k: _filled(values, size, given) for k, given in self.kwargs.items()}
        if self.changed is None:
            return self.function(*args, **kwargs)
        args[self.changed] = changed = args[self.changed].clone()
        self.function(*args, **kwargs)
        return changed


@dataclass(frozen=True)
class Program:
    """Calls of which the last gives the result.

    Args:
        steps: in order; the values are the inputs, the parameters and buffers, and what each of these gives.
        inputs: where the module has the samples of each input.
        result: where it has those of the result.
        buffers: names of the buffers.
        types: of the parameters and buffers; a buffer of integers lies in the stack as floats.
    """

    steps: tuple[Step, ...]
    inputs: tuple[Place, ...]
    result: Place
    buffers: tuple[str, ...]
    types: tuple[torch.dtype, ...]

    def __call__(self, inputs: Sequence[Tensor], parts: Sequence[Tensor], size: int) -> Tensor:
        """[B, ...] from inputs [B, ...], parameters and buffers, for so many samples."""
        values: list[Any] = [place.as_in_module(x) for x, place in zip(inputs, self.inputs, strict=True)]
        values += [p if t.is_floating_point else p.round().to(t) for p, t in zip(parts, self.types, strict=True)]
        for step in self.steps:
            values.append(step(values, size))
        return self.result.samples_first(values[-1])


class Segment(Local):
    """A program as an op of a tape."""

    def __init__(self, spec: Spec, bound: Bound) -> None:
        super().__init__(spec, bound)
        self.program: Program = spec.settings["program"]
        self.buffers = [bound.views[name].data for name in self.program.buffers]

    def compute(self, *tensors: Tensor) -> Tensor:
        given = len(self.spec.inputs)
        inputs, parts = tensors[:given], [*tensors[given:], *self.buffers]
        self.inputs = [x.detach() for x in inputs]
        clients, size = self.bound.batch.rows
        if not self.bound.lead:
            return self.program(inputs, parts, size)
        if parts:
            return vmap(partial(self.program, size=size))(inputs, parts)
        return self.program([x.flatten(0, 1) for x in inputs], (), clients * size).unflatten(0, (clients, size))

    def each(self, i: int, dy: Tensor) -> Tensor:
        """By the program on single samples."""

        def along(own: Tensor, others: list[Tensor], inputs: list[Tensor], dy: Tensor) -> Tensor:
            parts = [*others[:i], own, *others[i + 1 :]]
            return (self.program([x[None] for x in inputs], parts, 1)[0] * dy).sum()

        lead, parts = self.bound.lead, [p.detach() for p in (*self.params, *self.buffers)]
        by_sample = vmap(grad(along), in_dims=(None, None, 0, 0))
        clients = [by_client(t, lead) for t in (*parts, *self.inputs, dy)]
        parts, inputs, dy = clients[: len(parts)], clients[len(parts) : -1], clients[-1]
        return vmap(by_sample)(parts[i], parts, inputs, dy)


def _filled(values: list[Any], size: int, given: Any) -> Any:
    """An argument with its `Ref`s and `Size`s replaced."""
    kind = type(given)
    if kind is Ref:
        return values[given.index]
    if kind is Size:
        return size * given.times
    return mapped(partial(_filled, values, size), given) if kind in (tuple, list, dict, slice) else given
