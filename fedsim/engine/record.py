"""What a module does, function by function, recorded while it runs.

A mode of torch sees every function that is called and the tensors it is called on, whatever Python stands between. The
module runs twice, on 3 samples and on these and 2 others. What differs tells which axis of a value holds the samples
and which numbers follow from the size of the batch; a module whose samples see each other, or that looks at its data,
cannot be recorded.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function

from fedsim.engine.calls import Call, Place, Ref, Size, Unsupported, leaves, mapped
from fedsim.engine.functional import outputs_of
from fedsim.engine.noise import DROPOUTS, KeyedDropout, dropout_of, written_out
from fedsim.params import moving_buffers
from fedsim.trees import Tree, tensors

FEW, MORE = 3, 5  # samples of the two runs
WHOLE_LAYERS = (KeyedDropout, nn.BatchNorm1d, nn.BatchNorm2d, nn.LSTM, nn.GRU)
"""Layers that are recorded as one call."""

_METADATA = (torch.dtype, torch.device, torch.layout, torch.Size, torch.memory_format, str)
_SAYS_NOTHING = {  # of the numbers in a tensor
    *("__get__", "__len__", "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "get_device"),
    *("is_contiguous", "is_floating_point", "is_complex", "is_same_size", "storage_offset"),
}


@dataclass(frozen=True)
class Recording:
    """All calls of a module in order.

    Args:
        calls: the inputs come first.
        inputs: names of the module's inputs; one without a name where it takes one tensor.
        result: index of the call that gives the outputs.
        reads_only: the module leaves its inputs alone.
    """

    calls: list[Call]
    inputs: tuple[str, ...]
    result: int
    reads_only: bool


def record(module: nn.Module, sample: Tree, dtype: torch.dtype | None = None) -> Recording:
    """The calls of a keyed copy of a module in training mode; the copy is of no use afterwards.

    Args:
        module: see `keyed_copy`.
        sample: one sample, by whose shape and type others are made up; indices are drawn from its range.
        dtype: of the floating-point parameters, else the module's own.

    Raises:
        Unsupported: if it cannot be told what the module does with any samples.
    """
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    floats = [t.dtype for t in (*parameters.values(), *buffers.values()) if t.is_floating_point()]
    kind = dtype or (floats[0] if floats else torch.get_default_dtype())
    generator = torch.Generator().manual_seed(0)
    more = {k: _made_up(t, kind, generator) for k, t in tensors(sample).items()}
    few = {k: t[MORE - FEW :].clone() for k, t in more.items()}
    _call_whole(module.train())
    runs = []
    lent = _copied(parameters, kind)  # once, for a large model; buffers are there to be written to
    for inputs in (few, more):
        parts = lent | _copied(buffers, kind)
        recorder = _Recorder(module, inputs, parts)
        with torch.enable_grad(), recorder:
            made = outputs_of(module, dict(parts), inputs[""] if "" in inputs else inputs)
        runs.append((recorder.calls, recorder.known.get(id(made))))
    calls = _compared(runs[0][0], runs[1][0])
    result = runs[0][1]
    if result is None or result != runs[1][1]:
        raise Unsupported("what the module returns does not follow from its inputs")
    return Recording(calls, tuple(more), result, all(t._version == 0 for t in few.values()))


def _copied(named: Mapping[str, Tensor], kind: torch.dtype) -> dict[str, Tensor]:
    return {k: t.detach().to(kind if t.is_floating_point() else t.dtype, copy=True) for k, t in named.items()}


def call_layer(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a layer gives while it is recorded: some function of single samples, in the shape of its outputs."""
    if isinstance(layer, nn.LSTM | nn.GRU):
        plain: Callable[..., Any] = type(layer).forward
        return plain(layer, *args, **kwargs)[0]
    return args[0] if isinstance(layer, KeyedDropout) and layer.p == 0 else 0.5 * args[0]


def _call_whole(module: nn.Module) -> None:
    """Has calls of `WHOLE_LAYERS` recorded as such."""

    def forward_of(layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            made = handle_torch_function(call_layer, args[:1], layer, *args, **kwargs)
            if not isinstance(layer, nn.LSTM | nn.GRU):
                return made
            # of one layer the last output is the final state; others are not known here
            last = made.select(int(layer.batch_first), -1).unsqueeze(0) if layer.num_layers == 1 else None
            return (made, last) if isinstance(layer, nn.GRU) else (made, (last, None))

        return forward

    for layer in module.modules():
        if type(layer) in WHOLE_LAYERS:
            layer.forward = forward_of(layer)


def _made_up(sample: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[MORE, ...] samples like one."""
    shape = (MORE, *sample.shape)
    if sample.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=dtype).to(sample.device)
    low, high = (min(int(sample.min()), 0), max(int(sample.max()), 1)) if sample.numel() else (0, 1)
    return torch.randint(low, high + 1, shape, generator=generator).to(sample.device, sample.dtype)


class _Recorder(TorchFunctionMode):
    """Notes the calls that this thread makes from `__enter__` to `__exit__`.

    Args:
        module: that is called.
        inputs: it is called on, by name.
        parts: its parameters and buffers, by name.
    """

    def __init__(self, module: nn.Module, inputs: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.known: dict[int, int] = {}  # which call gave a tensor, by the tensor's identity
        self.gone: set[int] = set()  # tensors changed through another one
        self.alive: list[Any] = []  # or another tensor might get the identity of one that is gone
        self.layers = {id(layer): name for name, layer in module.named_modules()}
        parameters = {name for name, _ in module.named_parameters()}
        own = parameters | set(moving_buffers(module))
        for name, t in inputs.items():
            self._add(Call(None, (), {}, t, name, of_inputs=True))
        for name, t in parts.items():
            self._add(Call(None, (), {}, t, name, of_module=name in own, parameter=name in parameters))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inner = written_out(func, args, kwargs)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        given = [t for t in leaves((args, kwargs)) if isinstance(t, Tensor)]
        versions = [t._version for t in given]
        noted_args, noted_kwargs = mapped(self._noted, (args, kwargs))
        made = _without_noise(func, args, kwargs) if func in DROPOUTS else func(*args, **kwargs)
        changed = [i for i, (t, before) in enumerate(zip(given, versions, strict=True)) if t._version != before]
        if any(made is t for t in given) and not changed:
            return made
        call = Call(func, noted_args, noted_kwargs, made, getattr(func, "__name__", str(func)))
        if not call.name.startswith("new_"):  # these ask a tensor for its type alone
            call.of_inputs = any(self.calls[i].of_inputs for i in call.refs)
            call.of_module = any(self.calls[i].of_module for i in call.refs)
        if changed:
            self._change(call, args, [given[i] for i in changed])
        elif isinstance(made, tuple | list) and any(isinstance(t, Tensor) for t in made):
            self._add(call)
            for j, part in enumerate(made):
                pick = Call(lambda parts, j: parts[j], (Ref(len(self.calls) - 1 - j), j), {}, part, "getitem")
                pick.of_inputs, pick.of_module = call.of_inputs, call.of_module
                self._add(pick)
        elif isinstance(made, Tensor):
            self._add(call)
        elif not isinstance(made, _METADATA) and call.name not in _SAYS_NOTHING:
            if call.of_inputs or call.of_module:
                raise Unsupported(f"the module looks at its data ({call.name})")
        return made

    def _add(self, call: Call) -> None:
        if call.layer is None and call.function is call_layer:
            call.layer, call.args = call.args[0], call.args[1:]
            call.name = self.layers[id(call.layer)]
        if call.function is not None and not torch.is_grad_enabled() and (call.of_inputs or call.of_module):
            if call.layer is not None or call.function in DROPOUTS:
                raise Unsupported(f"{call.name} runs in no_grad")
            call.function, call.name = torch.no_grad()(call.function), f"{call.name} in no_grad"
        self.known[id(call.value)] = len(self.calls)
        self.alive.append(call.value)
        self.calls.append(call)

    def _change(self, call: Call, args: tuple[Any, ...], changed: list[Tensor]) -> None:
        """A call that changed one of its arguments in place: from now on that tensor is its value."""
        before = self.calls[self.known[id(changed[0])]]
        at = next((i for i, given in enumerate(args) if given is changed[0]), None)
        if at is None or len(changed) > 1 or (before.function is None and not before.of_inputs):
            raise Unsupported(f"{call.name} changes in place what is no value of its first arguments")
        for other in self.calls:
            if isinstance(other.value, Tensor) and _memory(other.value) == _memory(changed[0]):
                self.gone.add(id(other.value))
                other.value = None
        self.gone.discard(id(changed[0]))
        call.value, call.changed = changed[0], at
        call.shape, call.dtype = tuple(changed[0].shape), changed[0].dtype
        self._add(call)

    def _noted(self, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        if id(given) in self.gone:
            raise Unsupported("a tensor is read that was changed in place under another name")
        if id(given) not in self.known:  # a tensor that the module has beside its parameters and buffers
            self._add(Call(None, (), {}, given, "constant"))
        return Ref(self.known[id(given)])


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _without_noise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What stands for dropout while it is recorded."""
    x, rate, training, inplace = dropout_of(*args, **kwargs)
    if not training or rate == 0:
        return x
    return x.mul_(0.5) if inplace else 0.5 * x


def _compared(few: list[Call], more: list[Call]) -> list[Call]:
    """The calls of the run on few samples, with what the other run adds to them."""
    if [c.name for c in few] != [c.name for c in more]:
        raise Unsupported("the module does not do the same with any number of samples")
    for call, other in zip(few, more, strict=True):
        args = (call.args, call.kwargs), (other.args, other.kwargs)
        call.args, call.kwargs = mapped(partial(_argument, call.name), *args)
        call.place = _place(call, other)
    return few


def _argument(name: str, few: Any, more: Any) -> Any:
    """What both runs gave to a call."""
    if isinstance(few, bool) or not isinstance(few, int):
        if isinstance(few, float | complex | Ref) and few != more:
            raise Unsupported(f"{name} depends on the number of samples")
        return few
    if few == more:
        return few
    if few % FEW or few * MORE != more * FEW:
        raise Unsupported(f"{name} depends on the number of samples")
    return Size(few // FEW)


def _place(call: Call, other: Call) -> Place | None:
    """Where the sizes of both runs differ, such that what their samples have in common is the same.

    Raises:
        Unsupported: if there is no such place, or a value without samples is not the same.
    """
    if call.dtype is None or other.dtype is None:
        return None
    axes = [i for i, (a, b) in enumerate(zip(call.shape, other.shape, strict=True)) if a != b]
    sizes = [(call.shape[i], other.shape[i]) for i in axes]
    if len(axes) > 1 or any(few % FEW or few * MORE != more * FEW for few, more in sizes):
        raise Unsupported(f"{call.name} has samples on more than one axis, or not as many entries for each")
    if call.value is None or not (call.of_inputs or not axes):  # zeros, say, of as many rows as there are samples
        return Place(axes[0], after=sizes[0][0] // FEW) if axes else None
    if not axes:
        if call.of_inputs or not _same(call.value, other.value):
            raise Unsupported(f"{call.name} does not keep samples apart, or is random")
        return None
    times = sizes[0][0] // FEW
    for before in (1, *(n for n in range(times, 1, -1) if times % n == 0)):
        place = Place(axes[0], before, times // before)
        if _same(place.samples_first(call.value), place.samples_first(other.value)[MORE - FEW :]):
            return place
    raise Unsupported(f"{call.name} does not keep samples apart, or is random")


def _same(value: Tensor, other: Tensor) -> bool:
    if (equal := torch.equal(value, other)) or not value.is_floating_point():
        return equal
    size = float(value.abs().nan_to_num(0, 0, 0).max()) if value.numel() else 0.0
    return torch.allclose(value, other, rtol=1e-3, atol=1e-3 * size, equal_nan=True)
