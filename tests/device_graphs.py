"""Pretend CUDA graphs for the pretend GPU of `tests.device`, noted where its operations are done on CPU tensors.

A capture notes operations and does nothing that lasts: what they write to stays as it was, and what they make is NaN
until a replay, which does them again on the same memory. So a number that was baked in, or an input that was not in
a place of the graph's own, shows as a wrong number. As on a GPU: what waits for the device can't be captured; there is
one capture at a time; a replay spoils what other graphs left in a pool that they share; a pool ends with its last
graph. The streams here do nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

_here = threading.local()  # `graph`: what this thread notes operations for
_one_at_a_time = threading.Lock()
_pools: dict[object, WeakSet[Graph]] = {}


class Graph:
    """torch.cuda.CUDAGraph."""

    launched: Callable[[Graph], None]

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: list[Tensor] = []
        self.done = False

    def begin(self, pool: object) -> None:
        if pool in _pools and not len(_pools[pool]):
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: the pool ended with its last graph")
        self._pool = pool if pool is not None else object()
        _pools.setdefault(self._pool, WeakSet()).add(self)

    def pool(self) -> object:
        assert self.done
        return self._pool

    def replay(self) -> None:
        assert self.done and capturing() is None
        type(self).launched(self)
        for other in _pools[self._pool]:
            spoil(other.made)
        for func, args, kwargs, given in self.steps:
            for old, new in zip(given, tensors_of(func(*args, **kwargs)), strict=True):
                if old is not new:
                    old.copy_(new)

    def accesses(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a replay reads, and what it writes to."""
        written = [t for func, args, kwargs, _ in self.steps for t in written_by(func, args, kwargs)]
        return [t for _, args, kwargs, _ in self.steps for t in tensors_of((args, kwargs))], [*written, *self.made]

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation of a capture; its results are those of the right shapes."""
        name = func._overloadpacket.__name__
        before = tensors_of((args, kwargs))
        copies = {id(t): t.clone() for t in written_by(func, args, kwargs)}
        originals = {id(copies[id(t)]): t for t in before if id(t) in copies}
        given = func(*_swapped(copies, args), **_swapped(copies, kwargs))
        given = _swapped(originals, given)
        known = {t.untyped_storage().data_ptr() for t in before}
        fresh = [t for t in tensors_of(given) if t.untyped_storage().data_ptr() not in known]
        spoil(fresh)
        self.made += fresh
        if (fresh or copies) and name not in ALLOCATES:
            self.steps.append((func, args, kwargs, tensors_of(given)))
        return given


class Capture(TorchDispatchMode):
    """torch.cuda.graph: a mode, since autograd takes a thread's modes along to the threads where it works for it."""

    def __init__(self, graph: Graph, pool: object = None, stream: object = None, capture_error_mode: str = "global"):
        super().__init__()
        assert capture_error_mode == "thread_local", "other threads work on"
        self.graph, self.of_graphs = graph, pool

    def __enter__(self) -> Any:
        torch.cuda.synchronize()
        assert _one_at_a_time.acquire(blocking=False), "one capture at a time"
        self.graph.begin(self.of_graphs)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        _one_at_a_time.release()
        self.graph.done = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _here.graph = self.graph
        try:
            return func(*args, **(kwargs or {}))
        finally:
            _here.graph = None


def capturing() -> Graph | None:
    """The graph for which this thread works at the moment."""
    return getattr(_here, "graph", None)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on the CPU tensors inside: done, or noted by the capture that is under way."""
    graph = capturing()
    if graph is None or torch.Tag.inplace_view in func.tags:
        return func(*args, **kwargs)
    return graph.note(func, args, kwargs)


def refuse_to_wait() -> None:
    """Raise as CUDA does where a thread that captures would have to wait for the device."""
    if capturing() is not None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def fakes(launched: Callable[[Graph], None]) -> dict[str, Any]:
    """What stands in torch.cuda, and tells which graphs are launched."""
    _pools.clear()
    Graph.launched = staticmethod(launched)
    nothing: dict[str, Any] = {"Stream": lambda device=None: None, "stream": lambda stream: nullcontext()}
    return nothing | {"CUDAGraph": Graph, "graph": Capture, "graph_pool_handle": object}


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_of(value)
    return found


def spoil(tensors: list[Tensor]) -> None:
    """What nobody may read."""
    for t in tensors:
        if t.is_floating_point():
            t.fill_(torch.nan)


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _swapped(by: dict[int, Tensor], tree: Any) -> Any:
    return tree_map(lambda t: by.get(id(t), t) if isinstance(t, Tensor) else t, tree)
