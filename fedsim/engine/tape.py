"""A module as a list of stacked ops, from one symbolic trace by torch.fx.

The shapes of one sample are found by running the traced module on batches of two sizes; whatever does not keep the
batch axis in front, or is no op known here, raises `Unsupported` with the layer and the reason, and another path
carries the module.

Letters: C clients, B samples. Slot 0 of a tape holds the inputs.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedsim.engine.images import Conv2d, MaxPool2d, padding
from fedsim.engine.noise import KeyedDropout
from fedsim.engine.norms import BatchNorm, GroupNorm, LayerNorm
from fedsim.engine.ops import Add, Bound, Dropout, Embedding, Linear, Local, Op, PerImage, ReLU, Reshape, Spec
from fedsim.engine.recurrent import LSTM, lstm_params

POINTWISE_LAYERS = (
    *(nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.ReLU6, nn.Softplus),
    *(nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.LogSigmoid, nn.Tanhshrink),
)
POINTWISE = {
    *(F.gelu, F.tanh, F.sigmoid, F.silu, F.elu, F.selu, F.celu, F.leaky_relu, F.relu6, F.softplus, F.softsign),
    *(F.hardtanh, F.hardswish, F.mish, F.logsigmoid, torch.tanh, torch.sigmoid, torch.exp, torch.square, torch.abs),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul),
}
POINTWISE_METHODS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "exp": torch.exp, "square": torch.square}
RESHAPES = {torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze}
RESHAPE_METHODS = {"flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "contiguous"}
PER_IMAGE = {F.avg_pool2d, F.adaptive_avg_pool2d, torch._C._nn.avg_pool2d}


class Unsupported(Exception):
    """This module has no tape; the text names the layer and why."""


@dataclass(frozen=True)
class Tape:
    """Ops in order of execution, with the number of slots they use.

    Args:
        specs: the ops.
        num_slots: inputs and intermediate values.
        result: the slot of the outputs.
        fusible: every parameter is used once, so that a step of SGD may be applied within the backward pass.
        reads_only: the module itself, run as it is, leaves its inputs alone.
    """

    specs: tuple[Spec, ...]
    num_slots: int
    result: int
    fusible: bool
    reads_only: bool

    def bind(self, bound: Bound) -> list[Op]:
        """Fresh ops on the views of one stack."""
        return [spec.make(spec, bound) for spec in self.specs]


def trace(module: nn.Module, sample: Tensor) -> Tape:
    """The tape of a keyed copy of a module, for samples of the shape and dtype of `sample` [...].

    Raises:
        Unsupported: if some part of the module is not known, or frozen: under vmap the product with a frozen weight is
            taken once for all clients, and a stack costs no more than a plain pass over all its samples.
    """
    if frozen := [name for name, p in module.named_parameters() if not p.requires_grad]:
        raise Unsupported(f"{frozen[0]} is frozen")
    try:
        graph = _Tracer().trace(module.train())
        shapes = _shapes(module, graph, sample)
        reads_only = _reads_only(module, sample)
    except Unsupported:
        raise
    except Exception as error:  # tracing runs the user's own code, which may fail in any way
        raise Unsupported(f"{type(error).__name__} while tracing: {error}") from error
    return _Builder(module, graph, shapes).build(reads_only)


class _Tracer(fx.Tracer):
    """While it traces, torch.fx sends every module call of the process here; those of other threads pass."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, KeyedDropout) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Runs the module and notes the shape of every tensor."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)  # without a GraphModule, whose generated source torch keeps for good
        self.found: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output" and isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            self.found[n.name] = tuple(value[0].shape)  # an LSTM's output, before its states
        if isinstance(value, Tensor):
            self.found[n.name] = tuple(value.shape)
        return value


def _shapes(module: nn.Module, graph: fx.Graph, sample: Tensor) -> dict[str, tuple[int, ...] | None]:
    """Each tensor's shape for one sample, or None where the first axis is not that of the samples."""
    training = module.training
    sample = _in_dtype(module, sample)
    try:
        runs = []
        for size in (5, 7):
            runner = _Shapes(module.eval(), graph)
            with torch.no_grad():
                runner.run(sample.new_zeros(size, *sample.shape))
            runs.append(runner.found)
    finally:
        module.train(training)
    five, seven = runs
    return {
        k: a[1:] if a[:1] == (5,) and seven[k][:1] == (7,) and a[1:] == seven[k][1:] else None for k, a in five.items()
    }


def _reads_only(module: nn.Module, sample: Tensor) -> bool:
    """Whether a pass leaves its inputs alone: run to see, as a trace takes `x += 1` for an ordinary sum."""
    training, inputs = module.training, _in_dtype(module, sample).new_zeros(2, *sample.shape)
    try:
        with torch.no_grad():
            module.eval()(inputs)
    finally:
        module.train(training)
    return inputs._version == 0


def _in_dtype(module: nn.Module, sample: Tensor) -> Tensor:
    return sample.to(next(iter(module.parameters()), sample).dtype) if sample.is_floating_point() else sample


class _Builder:
    """Turns nodes into specs, one after another."""

    def __init__(self, module: nn.Module, graph: fx.Graph, shapes: dict[str, tuple[int, ...] | None]) -> None:
        self.modules = dict(module.named_modules())
        self.graph = graph
        self.shapes = shapes
        self.slots: dict[str, int] = {}
        self.specs: list[Spec] = []

    def build(self, reads_only: bool) -> Tape:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.slots:
                    raise Unsupported("the module takes more than one input")
                self.slots[node.name] = 0
            elif node.op == "output":
                self._finish(node)
            elif node.name in self.shapes:
                self._add(node)
            # what is left are sizes: the shapes are known, so nobody reads them
        specs = _lift_pools(self.specs)
        specs = _mark(specs)
        used = Counter(name for spec in specs for name in spec.params)
        fusible = max(used.values(), default=0) <= 1
        return Tape(tuple(specs), len(specs) + 1, self.result, fusible=fusible, reads_only=reads_only)

    def _finish(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node) or result.name not in self.slots:
            raise Unsupported("the module does not return one tensor")
        self.result = self.slots[result.name]

    def _add(self, node: fx.Node) -> None:
        shape = self.shapes[node.name]
        if shape is None:
            raise Unsupported(f"{node.name} does not keep the samples in its first axis")
        if node.op == "call_module":
            parts = self._layer(node)
        elif node.op in ("call_function", "call_method"):
            parts = self._function(node)
        else:
            raise Unsupported(f"{node.name} reads a tensor of the module outside a known layer")
        if parts is None:  # nothing to do: the value is its input
            self.slots[node.name] = self._inputs(node)[0]
            return
        make, options = parts
        if make is LSTM:
            options["params"] = lstm_params(options["layer"], str(node.target))
        inputs = self._inputs(node)
        self.slots[node.name] = slot = max(self.slots.values()) + 1
        name = str(node.target) if node.op == "call_module" else node.name
        call = sum(spec.name == name for spec in self.specs)
        self.specs.append(Spec(make=make, name=name, inputs=inputs, output=slot, shape=shape, call=call, **options))

    def _inputs(self, node: fx.Node) -> tuple[int, ...]:
        """Slots of the tensors a node reads."""
        return tuple(self.slots[n.name] for n in node.args if isinstance(n, fx.Node) and n.name in self.slots)

    def _layer(self, node: fx.Node) -> tuple[Callable[..., Op], dict[str, Any]] | None:
        layer = self.modules[str(node.target)]
        kind = type(layer)
        if kind is nn.Identity or (kind is KeyedDropout and layer.p == 0):
            return None
        make = _LAYERS.get(kind)
        reason = _refusal(layer)
        if make is None or reason:
            raise Unsupported(f"layer {node.target} ({kind.__name__}) {reason or 'has no stacked form'}")
        own = {k: p for k, p in layer.named_parameters(recurse=False) if p is not None}
        if getattr(layer, "inplace", False):
            layer = copy(layer)
            layer.inplace = False
        options: dict[str, Any] = {"layer": layer, "params": tuple(f"{node.target}.{k}" for k in own)}
        if make in (Local, PerImage):
            options["function"] = layer
        return make, options

    def _function(self, node: fx.Node) -> tuple[Callable[..., Op], dict[str, Any]] | None:
        target: Any = node.target
        tensors = [n for n in node.args if isinstance(n, fx.Node) and n.name in self.slots]
        if any(isinstance(n, fx.Node) and n.name in self.shapes for n in node.kwargs.values()):
            raise Unsupported(f"{node.name} takes a tensor by keyword")
        if target is operator.getitem:
            source = tensors[0] if tensors else None
            if source is None or node.args[1] != 0 or type(self.modules.get(str(source.target))) is not nn.LSTM:
                raise Unsupported(f"{node.name} indexes a tensor")
            return None
        if target in RESHAPES or (node.op == "call_method" and target in RESHAPE_METHODS):
            return Reshape, {}
        if target in (F.relu, torch.relu, "relu"):
            return ReLU, {}
        if target in (F.max_pool2d, torch.max_pool2d):
            return MaxPool2d, {"layer": _max_pool(*node.args[1:], **node.kwargs)}
        if target in PER_IMAGE:
            return PerImage, {"function": partial(_with_constants, target, node.args[1:], dict(node.kwargs))}
        if target in ("mean", torch.mean) and len(tensors) == 1:
            return Local, {"function": _mean(node, len(self.shapes[tensors[0].name] or ()) + 1)}
        if node.op == "call_method":
            target = POINTWISE_METHODS.get(target)
        if target in POINTWISE:
            return self._pointwise(node, target, tensors)
        raise Unsupported(f"{node.name} ({getattr(target, '__name__', target or node.target)}) has no stacked form")

    def _pointwise(
        self, node: fx.Node, target: Callable[..., Tensor], tensors: list[fx.Node]
    ) -> tuple[Callable[..., Op], dict[str, Any]]:
        """A function element by element: of tensors of one shape, and of constants."""
        if len({self.shapes[n.name] for n in tensors}) != 1 or any(
            isinstance(n, fx.Node) and n not in tensors for n in node.args
        ):
            raise Unsupported(f"{node.name} mixes tensors of several shapes")
        # what happens in place in the module does not here: its inputs may be a view of the data set
        args = [False if a is True else a for a in node.args]
        kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        if target in (operator.add, torch.add) and len(tensors) == 2 and not kwargs:
            return Add, {}
        order = [None if n in tensors else n for n in args]
        return Local, {"function": partial(_pointwise, target, order, kwargs)}


_LAYERS: dict[type[nn.Module], Callable[..., Op]] = {
    nn.Linear: Linear,
    nn.ReLU: ReLU,
    nn.Flatten: Reshape,
    nn.Unflatten: Reshape,
    KeyedDropout: Dropout,
    nn.Conv2d: Conv2d,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: PerImage,
    nn.AdaptiveAvgPool2d: PerImage,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.BatchNorm1d: BatchNorm,
    nn.BatchNorm2d: BatchNorm,
    nn.Embedding: Embedding,
    nn.LSTM: LSTM,
    **{kind: Local for kind in POINTWISE_LAYERS},
}


def _refusal(layer: nn.Module) -> str:
    """Why a layer of a known kind cannot be carried, or nothing."""
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or padding(layer) is None):
        return f"has padding {layer.padding!r} of mode {layer.padding_mode!r}"
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        return "has max_norm, scale_grad_by_freq or sparse gradients"
    if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        return "returns indices"
    if isinstance(layer, nn.LSTM) and (layer.bidirectional or layer.proj_size or not layer.batch_first):
        return "is bidirectional, projected or not batch_first"
    if isinstance(layer, nn.LSTM) and layer.dropout and layer.num_layers > 1:
        return "has dropout between its layers"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "has hooks"
    return ""


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


def _mark(specs: list[Spec]) -> list[Spec]:
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

    wanted = {0: False}
    channels_last = all(spec.make is not GroupNorm for spec in specs)
    out = []
    for spec in specs:
        needs = tuple(wanted[slot] for slot in spec.inputs)
        wanted[spec.output] = trains = any(needs) or bool(spec.params)
        first = makers.get(spec.inputs[0])
        fresh = first is not None and first.make in (Linear, Conv2d, MaxPool2d, Add)
        in_place = fresh and readers[spec.inputs[0]] == 1
        taker = only_taker(spec.output)
        own = taker is not None and taker.make in (Linear, Conv2d)
        spec = replace(spec, needs=needs, trains=trains, in_place=in_place, grad_in_place=own)
        out.append(replace(spec, channels_last=channels_last))
    return out


def _max_pool(
    kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False, **rest: Any
) -> nn.MaxPool2d:
    """The layer of a call of F.max_pool2d."""
    if rest.get("return_indices"):
        raise Unsupported("max_pool2d returns indices")
    return nn.MaxPool2d(kernel_size, stride, padding, dilation, ceil_mode=ceil_mode)


def _mean(node: fx.Node, ndim: int) -> Callable[[Tensor], Tensor]:
    """A mean over axes of a sample, which are counted from behind so that a client axis moves none of them."""
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keep = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    if dims is None or any(isinstance(d, fx.Node) for d in node.args[1:]):
        raise Unsupported(f"{node.name} is a mean over all axes")
    dims = [dims] if isinstance(dims, int) else list(dims)
    dims = [d if d < 0 else d - ndim for d in dims]
    return partial(torch.mean, dim=dims, keepdim=keep)


def _with_constants(
    function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> Tensor:
    return function(x, *args, **kwargs)


def _pointwise(function: Callable[..., Tensor], order: list[Any], kwargs: dict[str, Any], *tensors: Tensor) -> Tensor:
    rest = iter(tensors)
    return function(*(next(rest) if given is None else given for given in order), **kwargs)
