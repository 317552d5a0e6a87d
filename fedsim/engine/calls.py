"""What a recording of a module consists of: calls whose arguments refer to the values of other calls.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Unsupported(Exception):
    """This module has no tape; the text names the place and why."""


@dataclass(frozen=True)
class Ref:
    """In the arguments of a call: the value of an earlier one."""

    index: int


@dataclass(frozen=True)
class Size:
    """In the arguments of a call: so many times the size of the batch."""

    times: int


@dataclass(frozen=True)
class Place:
    """Where the module has the samples of a value: along one axis, whose index is (before, sample, after).

    A slot of a tape has them in front, [B, ...] or [B, before, after, ...], without those of the two that are 1.
    """

    axis: int = 0
    before: int = 1
    after: int = 1

    @property
    def times(self) -> int:
        """Entries of the axis for each sample."""
        return self.before * self.after

    def in_module(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in the module of a slot's value [B, ...]."""
        rest = list(shape[1 + (self.before > 1) + (self.after > 1) :])
        rest.insert(self.axis, shape[0] * self.times)
        return tuple(rest)

    def as_in_module(self, x: Tensor) -> Tensor:
        """A slot's value [B, ...] as the module has it."""
        if self.times > 1:
            x = x.movedim(0, int(self.before > 1)).flatten(0, (self.before > 1) + (self.after > 1))
        return x.movedim(0, self.axis) if self.axis else x

    def samples_first(self, x: Tensor, lead: int = 0) -> Tensor:
        """The way back, behind so many other axes."""
        x = x.movedim(lead + self.axis, lead) if self.axis else x
        if self.times == 1:
            return x
        x = x.unflatten(lead, (*((self.before,) * (self.before > 1)), -1, *((self.after,) * (self.after > 1))))
        return x.movedim(lead + int(self.before > 1), lead)


@dataclass
class Call:
    """One recorded call, or a tensor that it begins with: an input, a parameter, a buffer, a constant.

    Args:
        function: what was called; None for a tensor to begin with.
        args, kwargs: with `Ref` for values of other calls and `Size` for sizes of the batch.
        value: what it gave in the run on few samples; None once another call has changed it in place.
        name: of the input, parameter, buffer or layer, else of the function.
        changed: which argument it changed in place, whose new state is its value; with None it gave a value.
        layer: the layer that was called as a whole.
        of_inputs: it depends on the samples.
        of_module: it depends on tensors of which every client has its own.
        parameter: it is such a tensor itself, and no buffer.
        shape, dtype: of a value that is one tensor.
        place: of the samples; None where it has none, or is several tensors.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any
    name: str
    changed: int | None = None
    layer: nn.Module | None = None
    of_inputs: bool = False
    of_module: bool = False
    parameter: bool = False
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    place: Place | None = None

    def __post_init__(self) -> None:
        if isinstance(self.value, Tensor):
            self.shape, self.dtype = tuple(self.value.shape), self.value.dtype

    @property
    def live(self) -> bool:
        """It is one tensor that has samples, and changes from step to step."""
        return self.place is not None and (self.of_inputs or self.of_module)

    @property
    def refs(self) -> list[int]:
        """Of the values it reads."""
        return [found.index for found in leaves((self.args, self.kwargs)) if isinstance(found, Ref)]


def leaves(tree: Any) -> Iterator[Any]:
    """What is in nested tuples, lists, dictionaries and slices."""
    if isinstance(tree, tuple | list):
        for part in tree:
            yield from leaves(part)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def mapped(change: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The same nest with each leaf changed, given what other nests of its form have at its place.

    Raises:
        ValueError: if one of them has another form.
    """
    if isinstance(tree, tuple | list):
        made = [mapped(change, *parts) for parts in zip(tree, *others, strict=True)]
        return made if isinstance(tree, list) else tuple(made)
    if isinstance(tree, dict):
        return {k: mapped(change, part, *(other[k] for other in others)) for k, part in tree.items()}
    if isinstance(tree, slice):
        return slice(*mapped(change, *((s.start, s.stop, s.step) for s in (tree, *others))))
    return change(tree, *others)
