"""A module as a list of stacked ops, from a recording of what it does.

Letters: C clients, B samples. The first slots of a tape hold the inputs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedsim.config import first_line
from fedsim.engine.calls import Call, Ref, Unsupported, leaves, mapped
from fedsim.engine.images import Conv2d, MaxPool2d
from fedsim.engine.norms import GroupNorm
from fedsim.engine.ops import Add, Bound, Linear, Op, ReLU, Reshape, Spec
from fedsim.engine.record import FEW, Recording, record
from fedsim.engine.rows import IN_FRONT, Row, row_of
from fedsim.engine.segment import Program, Segment, Step
from fedsim.trees import Tree


@dataclass(frozen=True)
class Tape:
    """Ops in order of execution, with the number of slots they use.

    Args:
        specs: the ops.
        inputs: names of the first slots; one without a name where the module takes one tensor.
        num_slots: inputs and intermediate values.
        result: the slot of the outputs.
        fusible: every parameter is used once, so that a step of SGD may be applied within the backward pass.
        reads_only: the module itself, run as it is, leaves its inputs alone.
    """

    specs: tuple[Spec, ...]
    inputs: tuple[str, ...]
    num_slots: int
    result: int
    fusible: bool
    reads_only: bool

    def bind(self, bound: Bound) -> list[Op]:
        """Fresh ops on the views of one stack."""
        return [spec.make(spec, bound) for spec in self.specs]


def trace(module: nn.Module, sample: Tree, dtype: torch.dtype | None = None) -> Tape:
    """The tape of a keyed copy of a module, for samples of the shape and type of `sample` [...].

    Args:
        module: is of no use afterwards.
        sample: one sample.
        dtype: of the parameters, else the module's own.

    Raises:
        Unsupported: if what the module does cannot be told, or some of it is frozen: under vmap the product with a
            frozen weight is taken once for all clients, and a stack costs no more than a plain pass over its samples.
    """
    if frozen := [name for name, p in module.named_parameters() if not p.requires_grad]:
        raise Unsupported(f"{frozen[0]} is frozen")
    try:
        recording = record(module, sample, dtype)
    except Unsupported:
        raise
    except Exception as error:  # it runs the user's own code, which may fail in any way
        raise Unsupported(f"{type(error).__name__} while it was recorded: {error}") from error
    return _Builder(recording).build()


class _Builder:
    """Turns calls into ops, each of which gives a value that has the samples in front.

    Calls without an op of their own are made where their value is read, if that is one place, so that segments are as
    long as they can be; but those that read parameters are ops by themselves, as these are batched otherwise. What has
    no samples, or is several tensors, is made anew for every reader.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording, self.calls = recording, recording.calls
        if self.calls[recording.result].place != IN_FRONT:
            raise Unsupported("the module does not return an output for each sample")
        self.needed = self._needed()
        found = {i: row_of(self.calls[i], self.calls) for i in self.needed}
        self.rows = {i: row for i, row in found.items() if row is not None}
        for i in self.needed:
            if self.calls[i].layer is not None and i not in self.rows:
                raise Unsupported(
                    f"layer {self.calls[i].name} ({type(self.calls[i].layer).__name__}) is used otherwise"
                )
        self.homes = self._homes()

    def build(self) -> Tape:
        first = len(self.recording.inputs)
        slots = {i: i for i in range(first)}
        specs: list[Spec] = []
        for i in self.needed:
            call = self.calls[i]
            if call.function is None or self.homes[i] != {i}:
                continue
            row = self.rows.get(i) or self._segment(i)
            slots[i] = first + len(specs)
            specs.append(
                Spec(
                    make=row.make,
                    name=row.params[0].rpartition(".")[0] if row.params else call.name,
                    inputs=tuple(slots[x.index] for x in row.inputs),
                    output=slots[i],
                    shape=_sample_shape(call),
                    params=row.params,
                    trains=call.dtype is not None and call.dtype.is_floating_point,
                    layer=call.layer,
                    settings=row.settings,
                )
            )
        specs = _mark(_lift_pools(specs), first)
        used = Counter(name for spec in specs for name in spec.params)
        return Tape(
            specs=tuple(specs),
            inputs=self.recording.inputs,
            num_slots=first + len(specs),
            result=slots[self.recording.result],
            fusible=max(used.values(), default=0) <= 1,
            reads_only=self.recording.reads_only,
        )

    def _needed(self) -> list[int]:
        """The calls that the result and running statistics depend on, in order, but for constants."""
        tracked = [i for i, call in enumerate(self.calls) if isinstance(call.layer, nn.BatchNorm1d | nn.BatchNorm2d)]
        found, waiting = set[int](), [self.recording.result, *tracked]
        while waiting:
            i = waiting.pop()
            if i not in found and not self._constant(i):
                found.add(i)
                waiting += self.calls[i].refs
        return sorted(found)

    def _constant(self, i: int) -> bool:
        call = self.calls[i]
        return not (call.of_inputs or call.of_module or (call.function is not None and call.place))

    def _homes(self) -> dict[int, set[int]]:
        """The ops in which each call is made."""
        readers = defaultdict[int, set[int]](set)
        for i in self.needed:
            for j in self.calls[i].refs:
                readers[j].add(i)
        homes: dict[int, set[int]] = {}
        alone = {i for i in self.needed if i in self.rows or (self.calls[i].live and self._weighted(i))}
        for i in reversed(self.needed):
            found = {home for reader in readers[i] for home in homes[reader]}
            several = len(found) != 1 or any(reader in alone for reader in readers[i])
            homes[i] = {i} if i in alone or (self.calls[i].live and several) else found
        return homes

    def _weighted(self, i: int) -> bool:
        """Whether a call reads what every client has of its own, and samples have not."""
        read = [self.calls[j] for j in self.calls[i].refs]
        return any(c.of_module and not c.of_inputs and c.place is None for c in read)

    def _segment(self, end: int) -> Row:
        """The op that makes a call, and others for it."""
        made = [i for i in self.needed if end in self.homes[i] and self.calls[i].function is not None]
        read = {j for i in made for j in self.calls[i].refs if not self._constant(j)} - set(made)
        inputs = sorted(j for j in read if self.calls[j].live)
        parts = sorted((j for j in read if not self.calls[j].live), key=lambda j: (not self.calls[j].parameter, j))
        places = {j: at for at, j in enumerate((*inputs, *parts, *made))}

        def argument(given: Any) -> Any:
            if not isinstance(given, Ref):
                return given
            return Ref(places[given.index]) if given.index in places else self._value(given.index)

        steps = []
        for i in made:
            call = self.calls[i]
            args, kwargs = mapped(argument, (call.args, call.kwargs))
            assert call.function is not None
            steps.append(Step(_anyhow(call), args, kwargs, call.changed))
        kinds = [self.calls[j].dtype or torch.float32 for j in parts]
        program = Program(
            steps=tuple(steps),
            inputs=tuple(self.calls[j].place or IN_FRONT for j in inputs),
            result=self.calls[end].place or IN_FRONT,
            buffers=tuple(self.calls[j].name for j in parts if not self.calls[j].parameter),
            types=tuple(kinds),
        )
        self._check_batched(program, inputs, parts)
        params = tuple(self.calls[j].name for j in parts if self.calls[j].parameter)
        return Row(Segment, tuple(Ref(j) for j in inputs), params, {"program": program})

    def _check_batched(self, program: Program, inputs: list[int], parts: list[int]) -> None:
        """Refuse a function that torch cannot batch over clients, on the values of the recording as one client's."""
        values, own = ([self.calls[j].value for j in indices] for indices in (inputs, parts))
        if not parts or any(value is None for value in values + own):
            return
        samples = [place.samples_first(x.detach())[None] for x, place in zip(values, program.inputs, strict=True)]
        try:
            with torch.no_grad():
                vmap(partial(program, size=FEW))(samples, [p.detach()[None] for p in own])
        except RuntimeError as error:
            raise Unsupported(first_line(error)) from error

    def _value(self, i: int) -> Tensor:
        """Of a constant."""
        value = self.calls[i].value
        if not isinstance(value, Tensor) or self.calls[i].place is not None:
            raise Unsupported(f"{self.calls[i].name} is changed in place after it was read, or is no constant")
        return value.detach()


def _anyhow(call: Call) -> Any:
    """The function of a call, if need be in a form that takes values however they lie in memory."""
    sizes = call.name == "view" and not any(isinstance(a, torch.dtype) for a in leaves((call.args, call.kwargs)))
    return Tensor.reshape if sizes else call.function


def _sample_shape(call: Call) -> tuple[int, ...]:
    """Of one sample's value in a slot."""
    place = call.place or IN_FRONT
    within = (n for n in (place.before, place.after) if n > 1)
    return (*within, *call.shape[: place.axis], *call.shape[place.axis + 1 :])


def _lift_pools(specs: list[Spec]) -> list[Spec]:
    """ReLU then max-pool becomes max-pool then ReLU: the same numbers, on a quarter of the elements."""
    readers = Counter(slot for spec in specs for slot in spec.inputs)
    out = list(specs)
    for i in range(len(out) - 1):
        relu, pool = out[i], out[i + 1]
        if relu.make is ReLU and pool.make is MaxPool2d and pool.inputs == (relu.output,) and readers[relu.output] == 1:
            out[i] = replace(pool, inputs=relu.inputs, output=relu.output)
            out[i + 1] = replace(relu, inputs=pool.inputs, output=pool.output, shape=pool.shape)
    return out


def _mark(specs: list[Spec], num_inputs: int) -> list[Spec]:
    """Notes which inputs want gradients, which may be overwritten, and how images lie."""
    readers = Counter(slot for spec in specs for slot in spec.inputs)
    makers = {spec.output: spec for spec in specs}
    takers = {slot: spec for spec in specs for slot in spec.inputs}

    def only_taker(slot: int) -> Spec | None:
        """Who alone reads a value, or another shape of it."""
        while readers[slot] == 1:
            taker = takers[slot]
            if taker.make is not Reshape:
                return taker
            slot = taker.output
        return None

    wanted = dict.fromkeys(range(num_inputs), False)
    channels_last = all(spec.make is not GroupNorm for spec in specs)
    out = []
    for spec in specs:
        needs = tuple(wanted[slot] for slot in spec.inputs)
        wanted[spec.output] = trains = spec.trains and (any(needs) or bool(spec.params))
        first = makers.get(spec.inputs[0]) if spec.inputs else None
        fresh = first is not None and first.make in (Linear, Conv2d, MaxPool2d, Add)
        in_place = fresh and readers[spec.inputs[0]] == 1
        taker = only_taker(spec.output)
        own = taker is not None and taker.make in (Linear, Conv2d)
        spec = replace(spec, needs=needs, trains=trains, in_place=in_place, grad_in_place=own)
        out.append(replace(spec, channels_last=channels_last))
    return out
