"""The stacked engine: one forward and one backward pass for all clients of a stack.

A module known to the tape runs on hand-written stacked layers, with SGD fused into the backward products. Another
module runs under torch.func.vmap, and one that cannot be batched at all in the loop engine, with one warning.

Letters: C clients, B samples, P entries of a client's vector.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fedsim.engine import native as cpp
from fedsim.engine.base import Batch
from fedsim.engine.calls import Unsupported
from fedsim.engine.factors import Number, add_
from fedsim.engine.head import End, Head
from fedsim.engine.loop import LoopEngine
from fedsim.engine.losses import Loss, cross_entropy
from fedsim.engine.low_rank import chain_of
from fedsim.engine.noise import keyed_copy
from fedsim.engine.norms import BatchNorm
from fedsim.engine.ops import Bound, Op
from fedsim.engine.precision import products
from fedsim.engine.protocol import Engine
from fedsim.engine.sinks import GradientSink, SampleSink, SgdSink, Sink
from fedsim.engine.tape import Tape, trace
from fedsim.engine.vmapped import Vmapped, warn_of_change
from fedsim.params import Layout
from fedsim.trees import Tree, pick, tensors


class StackedEngine(Engine):
    """One batched forward and backward pass for all clients of a stack, plain SGD fused into it.

    `path` says how the module is carried once a batch was seen: tape, vmap or loop.

    Args:
        module, layout, loss, precision: as for `build_engine`.
        native: the end of a classifier runs in C++ where it can, see `LastLayer`.
    """

    name = "stacked"

    def __init__(
        self, module: nn.Module, layout: Layout, loss: Loss, precision: str = "fp32", native: bool = False
    ) -> None:
        self.layout = layout
        self.loss = loss
        self.precision = precision
        self.native = native
        self.module = module
        self.loop = LoopEngine(module, layout, loss, precision)
        self.vmapped = Vmapped(module, layout, loss, precision)
        # on a CPU runs in factors and in fp32 are faster than steps in any precision
        exact = precision == "fp32" or all(p.device.type == "cpu" for p in module.parameters())
        self.chain = chain_of(module) if exact and loss is cross_entropy else None
        self.path = ""
        self.reason = ""
        self._tapes: dict[object, Tape | None] = {}
        self._lock = threading.Lock()
        if native and cpp.compiled(torch.float32) is None:
            warnings.warn(
                "no C++ compiler works here (g++, clang++ or $CXX), so runtime.native=true runs without it: same "
                "numbers up to rounding",
                stacklevel=2,
            )

    def __reduce__(self) -> tuple[object, ...]:
        return StackedEngine, (self.module, self.layout, self.loss, self.precision, self.native)

    def session(self, x: Tensor) -> TapeSession:
        return TapeSession(self, x)

    def logits(self, x: Tensor, inputs: Tree) -> Tensor:
        return self.loop.logits(x, inputs)

    def tape(self, sample: Tree, dtype: torch.dtype) -> Tape | None:
        """The tape for samples like this one [...] and parameters of this type, or None if the module has none."""
        key = _kind(sample, 0), dtype
        if key not in self._tapes:
            with self._lock:
                if key not in self._tapes:
                    self._tapes[key] = self._trace(sample, dtype)
        return self._tapes[key]

    def reads_only(self, sample: Tree) -> bool:
        tape = self.tape(sample, torch.float32)
        return tape is not None and tape.reads_only

    def _trace(self, sample: Tree, dtype: torch.dtype) -> Tape | None:
        try:
            tape = trace(keyed_copy(self.module), sample, dtype)
        except Unsupported as unknown:
            self.reason = str(unknown)
            return None
        self.path = "tape"
        return tape

    def untaped(self, x: Tensor, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradient of a module that has no tape. One client's is a plain backward pass, which vmap only slows."""
        if len(x) == 1 or self.path == "loop":
            return self.loop.session(x).gradient(batch, out)
        if self.path == "vmap":
            return self.vmapped.gradient(x, batch, out)
        result, error = self.vmapped.gradient_or(lambda: self.loop.session(x).gradient(batch, out), x, batch, out)
        with self._lock:
            if error is not None and self.path != "loop":
                what = "cannot be batched over clients and runs in the loop engine"
                warn_of_change(self.module, what, error)
            self.path = "vmap" if error is None else "loop"
        return result


class TapeSession:
    """Ops of a tape bound to the rows of x [C, P]. Where there is no tape it hands on to its engine."""

    def __init__(self, engine: StackedEngine, x: Tensor) -> None:
        self.engine = engine
        self.x = x
        self.lead = int(len(x) > 1)
        self.views = engine.layout.views(x if self.lead else x[0])
        self.bound = Bound(lead=self.lead, views=self.views, low=engine.precision == "bf16")
        # bf16 is cast by the ops themselves
        self._products = nullcontext() if self.bound.low else products(engine.precision, x.device)
        self._tape: Tape | None = None
        self._ops: list[Op] = []
        self._end: End
        self._key: object = None

    def gradient(self, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._prepare(batch):
            return self.engine.untaped(self.x, batch, out)
        layout = self.engine.layout
        out = torch.empty_like(self.x, memory_format=torch.contiguous_format) if out is None else out
        views = layout.views(out if self.lead else out[0])
        sink = GradientSink(views)
        loss = self._run(batch, sink)
        for name in layout.names:
            if name not in sink.seen:
                views[name].zero_()
        return out, loss

    def sgd_step_(
        self,
        batch: Batch,
        lr: Number,
        *,
        scale: float = 1.0,
        shift: Tensor | None = None,
    ) -> Tensor | None:
        if not self._prepare(batch):
            return None
        assert self._tape is not None
        trained = self.x[:, : self.engine.layout.num_trainable]
        if self._tape.fusible:
            loss = self._run(batch, SgdSink(self.views, lr * scale))
        else:
            grad, loss = self.gradient(batch)
            add_(trained, grad[:, : trained.shape[1]], -lr * scale)
        if shift is not None:
            add_(trained, shift[..., : trained.shape[1]], -lr)
        return loss

    def weighted_sum(self, batch: Batch, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        # BatchNorm mixes samples; in bfloat16 norms would be too rough
        if self.bound.low or not self._prepare(batch, by_sample=True):
            return None
        assert self._tape is not None
        if any(spec.make is BatchNorm for spec in self._tape.specs):
            return None
        sink = SampleSink()
        loss = self._run(batch, sink)
        return sink.weighted_sum(self.engine.layout, self.x, batch, weigh), loss

    def _prepare(self, batch: Batch, by_sample: bool = False) -> bool:
        """Binds the tape for this kind of batch; False if there is none."""
        key = _kind(batch.inputs, 2), by_sample
        if key != self._key:
            self._key = key
            self._tape = self.engine.tape(pick(batch.inputs, (0, 0)), self.x.dtype)
            if self._tape is not None:
                self._bind(self._tape, by_sample)
        return self._tape is not None

    def _bind(self, tape: Tape, by_sample: bool) -> None:
        """The ops of a pass, and its end; C++ adds the samples up where it is that end."""
        engine, ops = self.engine, tape.bind(self.bound)
        native = cpp.last_layer(tape, self.bound, engine.loss) if engine.native and not by_sample else None
        self._end = native or Head(engine.loss, self.lead, tape.result)
        self._ops = ops[: len(ops) - self._end.length]

    def _run(self, batch: Batch, sink: Sink) -> Tensor:
        """One forward and backward pass; parameters' gradients go to the sink. Returns the loss [C]."""
        assert self._tape is not None
        inputs, targets, weights = tensors(batch.inputs), batch.targets, batch.weights
        if not self.lead:
            inputs, targets = {name: t[0] for name, t in inputs.items()}, pick(targets, 0)
            weights = None if weights is None else weights[0]
        self.bound.batch, self.bound.sink = batch, sink
        values = [inputs[name] for name in self._tape.inputs]
        values += values[:1] * (self._tape.num_slots - len(values))
        with self._products:
            for op in self._ops:
                spec = op.spec
                values[spec.output] = op.forward(*[values[i] for i in spec.inputs])
            loss, grad = self._end(values[self._end.start], targets, weights)
            if grad is not None:
                self._backward(grad)
        return loss if self.lead else loss.view(1)

    def _backward(self, grad: Tensor) -> None:
        assert self._tape is not None
        grads: list[Tensor | None] = [None] * self._tape.num_slots
        grads[self._end.start] = grad
        for op in reversed(self._ops):
            spec = op.spec
            found = grads[spec.output]
            if found is None or not spec.trains:
                continue
            grads[spec.output] = None
            for slot, part in zip(spec.inputs, op.backward(found), strict=True):
                if part is not None:
                    before = grads[slot]
                    grads[slot] = part if before is None else before + part


def _kind(inputs: Tree, lead: int) -> object:
    """What samples have in common that one tape suits, behind so many axes of a batch."""
    return tuple((name, t.shape[lead:], t.dtype) for name, t in tensors(inputs).items())
