"""CUDA graphs: what a session does for a minibatch is captured once, and replayed in one launch from then on.

A replay does to the same memory what the captured call did, with the same numbers. So what a call depends on is either
copied into tensors of the call's own (the minibatch, the keys of its noise, the learning rate), or tells it from other
calls: shapes and types, and where the stack and the place of its gradient lie. These lie in buffers of the worker, in
the same place from round to round, so that graphs outlive sessions.

A call is made as ever the first time, which prepares much that is kept, and the second, when it is watched: one that
draws from torch's generator, waits for the device or has shapes that depend on data can't be captured, and is made as
ever from then on. The third time it is captured, with the numbers of the first, and made both ways with the new ones: a
graph that gives something else is dropped with a warning.

Letters: C clients in the stack, B samples of a minibatch, P entries of a client's vector.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedsim.engine.base import Batch
from fedsim.engine.factors import CHUNK, Number, add_
from fedsim.engine.noise import generators
from fedsim.engine.protocol import Engine
from fedsim.params import Layout
from fedsim.streams import Streams
from fedsim.task import Session
from fedsim.trees import Tree, each, tensors

MOST = 64  # calls that a thread remembers: where more of them take turns, none is captured
TOLERANCE = 1e-2  # of the largest change: a GPU may add up in another order, and a wrong input is far off
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"}

_one_at_a_time = threading.Lock()  # torch captures one graph at a time in a process

Made = Callable[[Batch, Tensor], Tensor | None]
"""(minibatch, learning rate []) -> the loss [C], or None where sessions can't do it."""


class GraphedEngine(Engine):
    """An engine whose steps are replayed.

    Args:
        engine: does the work; nothing that it keeps from one call to the next changes what a call gives.
        layout: of the module.
    """

    def __init__(self, engine: Engine, layout: Layout) -> None:
        self.engine, self.layout = engine, layout
        self.name, self.chain = engine.name, engine.chain
        self.known = Known()

    def __reduce__(self) -> tuple[object, ...]:
        return GraphedEngine, (self.engine, self.layout)

    def session(self, x: Tensor) -> Session:
        return GraphedSession(self, x)

    def logits(self, x: Tensor, inputs: Tree) -> Tensor:
        return self.engine.logits(x, inputs)

    def reads_only(self, sample: Tree) -> bool:
        return self.engine.reads_only(sample)


class GraphedSession(Session):
    """Makes, or replays, the calls of a session of the engine."""

    def __init__(self, graphed: GraphedEngine, x: Tensor) -> None:
        self.engine, self.known, self.x = graphed.engine, graphed.known, x
        self.trained = x[:, : graphed.layout.num_trainable]

    @cached_property
    def plain(self) -> Session:
        return self.engine.session(self.x)

    def gradient(self, batch: Batch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if out is None:  # it would lie elsewhere every time
            return self.plain.gradient(batch)
        loss = self._loss(lambda session, batch, lr: session.gradient(batch, out)[1], place(out), batch, None, out)
        assert loss is not None
        return out, loss

    def sgd_step_(self, batch: Batch, lr: Number, *, scale: float = 1.0, shift: Tensor | None = None) -> Tensor | None:
        loss = self._loss(lambda session, batch, lr: session.sgd_step_(batch, lr, scale=scale), scale, batch, lr)
        if loss is not None and shift is not None:  # it may lie elsewhere every time, and a copy would cost as much
            add_(self.trained, shift[..., : self.trained.shape[1]], -lr)
        return loss

    def weighted_sum(self, batch: Batch, weigh: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        return self.plain.weighted_sum(batch, weigh)

    def _loss(
        self,
        work: Callable[[Session, Batch, Tensor], Tensor | None],
        key: object,
        batch: Batch,
        lr: Number | None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """What a call gives; beside that it writes to `out` and buffers of x, or to all of x."""
        call = self.known.call((place(self.x), key, kind(batch)), batch, self.x)
        if call.refused:
            return None
        if call.plain:
            return work(self.plain, batch, call.lr if lr is None else call.lr.fill_(lr))
        buffers = self.x[:, self.trained.shape[1] :]
        changed, written = ([self.trained, buffers], []) if out is None else ([buffers], [out])
        # each time in a new session, for what one keeps of a pass would fill the memory that graphs share
        anew = lambda *given: work(self.engine.session(self.x), *given)  # noqa: E731
        return call(self.known, anew, batch, lr, changed, written)


class Known(threading.local):
    """The calls that a thread knows, least recently used first. It works on one stream, so that graphs take turns."""

    def __init__(self) -> None:
        self.calls: OrderedDict[object, Call] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None

    def call(self, key: object, batch: Batch, x: Tensor) -> Call:
        """The call with a key, known or new."""
        found = self.calls[key] = self.calls.pop(key) if key in self.calls else Call(batch, x)
        if len(self.calls) > MOST:
            self.calls.popitem(last=False)
        return found

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Where graphs are captured: no other thread's, since libraries have working memory for each stream."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def pool(self) -> Any:
        """The memory that the thread's graphs share."""
        graphs = [call.graph for call in self.calls.values() if call.graph is not None]
        return graphs[0].pool() if graphs else torch.cuda.graph_pool_handle()


class Call:
    """A call that is made again and again in one place, and tensors of its own for what it reads.

    Attributes:
        plain: it can't be captured.
        refused: sessions can't do it.
    """

    def __init__(self, batch: Batch, x: Tensor) -> None:
        self.streams = None if batch.streams is None else OwnStreams.of(batch.streams)
        self.batch = replace(
            batch,
            inputs=each(torch.empty_like, batch.inputs),
            targets=each(torch.empty_like, batch.targets),
            weights=None if batch.weights is None else torch.empty_like(batch.weights),
            streams=self.streams,
            counts=None,  # a graph would keep those of one batch; a pass that needs them asks, and is not captured
        )
        self.lr = x.new_empty(())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = self.lr  # of the graph: the next replay of any writes over it
        self.times = 0
        self.believed = self.plain = self.refused = False

    def __call__(
        self,
        known: Known,
        work: Made,
        batch: Batch,
        lr: Number | None,
        changed: Sequence[Tensor],
        written: Sequence[Tensor],
    ) -> Tensor | None:
        """The loss [C] of a batch, or None where sessions can't do it.

        Args:
            known: the thread's calls, of which it is one.
            work: what is done, and replayed.
            batch: of the same kind as ever.
            lr: learning rate; None where the work reads none.
            changed: what the work reads and changes.
            written: what it only writes to.
        """
        self.times += 1
        if self.times == 3:
            self._capture(work, known)
        self._fill(batch, lr)
        if self.believed and self.graph is not None:
            self.graph.replay()
            return self.loss.clone()
        if self.graph is not None:
            return self._both(work, batch, changed, written)
        loss = self._watched(work, batch, changed) if self.times == 2 else work(self._with(batch), self.lr)
        self.refused = loss is None
        return loss

    def _fill(self, batch: Batch, lr: Number | None) -> None:
        """Write what the call reads."""
        for own, new in zip(_read(self.batch), _read(batch), strict=True):
            own.copy_(new)
        if self.streams is not None and batch.streams is not None:
            self.streams.fill(batch.streams, batch.step)
        if lr is not None:
            self.lr.fill_(lr)

    def _with(self, batch: Batch) -> Batch:
        """The call's own tensors, and a batch's numbers."""
        own, new = self.streams, batch.streams
        streams = None if own is None or new is None else replace(own, seed=new.seed)
        return replace(self.batch, streams=streams, step=batch.step)

    def _watched(self, work: Made, batch: Batch, changed: Sequence[Tensor]) -> Tensor | None:
        """Made as ever, while it is seen whether it can be captured."""
        before, start = generators(self.lr.device), [t.clone() for t in changed]
        try:
            with Watch() as watch:
                loss = work(self._with(batch), self.lr)
        except Exception:  # some of torch can't be watched: compiled functions, operations that take functions
            self.plain = True
            for t, old in zip(changed, start, strict=True):
                t.copy_(old)
            return work(self._with(batch), self.lr)
        self.plain = not watch.passed or not torch.equal(before, generators(self.lr.device))
        return loss

    def _capture(self, work: Made, known: Known) -> None:
        """Nothing is computed: what would be launched is noted."""
        graph, stream = torch.cuda.CUDAGraph(), known.stream(self.lr.device)
        options: dict[str, Any] = {"pool": known.pool(), "stream": stream, "capture_error_mode": "thread_local"}
        try:
            # the stream outside takes the thread back from a capture that breaks off, as the one inside does not
            with _one_at_a_time, torch.cuda.stream(stream), torch.cuda.graph(graph, **options):
                loss = work(self._with(self.batch), self.lr)
        except Exception:  # by something that the watch does not see; what is wrong without a graph too will be raised
            self.plain = True
            return
        assert loss is not None
        self.graph, self.loss = graph, loss

    def _both(self, work: Made, batch: Batch, changed: Sequence[Tensor], written: Sequence[Tensor]) -> Tensor:
        """Made as ever and by the graph, which is believed if it gives the same."""
        assert self.graph is not None
        before, places = [t.clone() for t in changed], [*changed, *written]
        loss = work(self._with(batch), self.lr)
        assert loss is not None
        expected = [t.clone() for t in places]
        for t, start in zip(changed, before, strict=True):
            t.copy_(start)
        for t in written:
            t.fill_(torch.nan)
        self.graph.replay()
        before += [t.new_zeros(()).expand_as(t) for t in (*written, loss)]
        self.believed = all(map(agree, (*places, self.loss), (*expected, loss), before))
        if not self.believed:
            warnings.warn(
                "a CUDA graph gave other numbers than the step that it stands for, which goes on without it; "
                "runtime.graphs=false makes none",
                stacklevel=2,
            )
            self.graph, self.plain = None, True
            for t, right in zip(places, expected, strict=True):
                t.copy_(right)
        return loss


@dataclass(frozen=True)
class OwnStreams(Streams):
    """Streams of a call: what seed and step make of a purpose is read from a tensor, not a number of the graph's.

    Args:
        bases: by the purposes that were asked for.
    """

    bases: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, streams: Streams) -> OwnStreams:
        return cls(streams.seed, streams.clients.clone(), streams.jobs.clone())

    def base(self, purpose: str, step: int) -> Tensor:
        if purpose not in self.bases:
            self.bases[purpose] = self.clients.new_zeros(()).fill_(super().base(purpose, step))
        return self.bases[purpose]

    def fill(self, streams: Streams, step: int) -> None:
        """Write those of a batch."""
        if self.bases:
            self.clients.copy_(streams.clients)
            self.jobs.copy_(streams.jobs)
        for purpose, base in self.bases.items():
            base.fill_(streams.base(purpose, step))


class Watch(TorchDispatchMode):
    """Sees whether all that is done while it is entered stays on one device, and asks nothing of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves((args, kwargs, given)) if isinstance(t, Tensor)]
        asks = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func._overloadpacket.__name__ in INDEXED:
            asks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        self.passed &= not asks and len({t.device for t in found}) <= 1
        return given


def place(t: Tensor) -> object:
    """Where a tensor lies in memory, and how."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def kind(batch: Batch) -> object:
    """What batches have in common for which one graph is right."""
    streams = batch.streams and (batch.streams.clients.shape, batch.streams.jobs.shape)
    return tuple(tensors(batch.inputs)), batch.weights is None, streams, tuple((t.shape, t.dtype) for t in _read(batch))


def agree(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether two changes of one tensor [C, ...] are the same up to the order of sums."""
    if not found.numel():
        return True
    some = max(1, CHUNK // found[0].numel())  # rows at a time: a stack may fill half of the memory
    for new, right, old in zip(found.split(some), expected.split(some), before.split(some), strict=True):
        change = right - old
        largest, start = (float(t.nan_to_num(0.0, 0.0, 0.0).abs().max()) for t in (change, old))
        rounding = 4 * torch.finfo(found.dtype).eps * start
        if not torch.allclose(new - old, change, rtol=0.0, atol=TOLERANCE * largest + rounding, equal_nan=True):
            return False
    return True


def _read(batch: Batch) -> tuple[Tensor, ...]:
    weights = () if batch.weights is None else (batch.weights,)
    return *tensors(batch.inputs).values(), *tensors(batch.targets).values(), *weights
