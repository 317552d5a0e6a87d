"""An elementwise step as one pass over memory, in compiled C++.

Torch's own compiler makes one pass too, but the way to it (guards, wrappers) costs more than a small stack's step, and
its loops look each coefficient up again for every coordinate. Here a call takes a few microseconds, the finite check
finds its numbers in the cache, and the GIL is free meanwhile. Where there is no compiler, or the step is not one that
`emit` can write, `step_` says None and the caller takes torch's.

Letters: k clients that step, P coordinates.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.native import TYPES, library
from fedsim.optim import emit
from fedsim.optim.pipeline import Block, Plan, Values, step_block_

_WEIGHTS = {"lr_weights", "decay_weights", "l2_weights"}
_ARRAYS = ("mask", "add", "average")  # of what all parts share
_SHARED = (*_ARRAYS, "average_rate", "average_first")
_MANY = 1 << 16  # entries from which several threads pay


class Kernel:
    """A compiled step.

    Args:
        library: the compiled code.
        ends: [R], where each run of coordinates ends that shares its weights.
        weights: [W, R], the weights of each run.
        arrays: how many it takes, x and g among them.
        numbers: how many coefficients.
    """

    def __init__(self, library: ctypes.CDLL, ends: np.ndarray, weights: np.ndarray, arrays: int, numbers: int) -> None:
        self._step = library.step
        self._step.restype = ctypes.c_long
        long, number, pointer = ctypes.c_long, ctypes.c_int, ctypes.c_void_p
        stack = (long, long, pointer, pointer, pointer, long, long)
        self._step.argtypes = (*stack, long, pointer, pointer, pointer, number, number)
        self._pointers, self._strides, self._numbers = pointer * arrays, long * arrays, ctypes.c_double * numbers
        self._kept = ends, weights
        self._runs = len(ends), ends.ctypes.data, weights.ctypes.data

    def __call__(
        self, x: Tensor, g: Tensor, arrays: Iterable[Tensor], numbers: Collection[Any], check: bool
    ) -> list[int]:
        """One step of every row of x [k, P] in place.

        Args:
            x, g: [k, P], entries of a row side by side.
            arrays: [k, P], [C, P] of which the first k rows count, or [1, P], in the kernel's order.
            numbers: floats, or [k, 1] tensors, in the kernel's order.
            check: leave out rows whose gradient is not finite.

        Returns:
            The rows that were left out.
        """
        k, p = x.shape
        taken = (x, *(_near(a) for a in (g, *arrays)))
        pointers = self._pointers(*[a.data_ptr() for a in taken])
        strides = self._strides(*[0 if k > 1 and len(a) == 1 else a.stride(0) for a in taken])
        coefs: Any
        if any(isinstance(v, Tensor) for v in numbers):
            table = np.stack([_column(v, k) for v in numbers])
            coefs, across, down = table.ctypes.data, k, 1
        else:
            coefs, across, down = self._numbers(*numbers), 1, 0
        bad = (ctypes.c_ubyte * k)()
        threads = torch.get_num_threads() if k * p >= _MANY else 1
        left = self._step(k, p, pointers, strides, coefs, across, down, *self._runs, bad, check, threads)
        return [r for r in range(k) if bad[r]] if left else []


def _column(value: Any, k: int) -> np.ndarray:
    if isinstance(value, Tensor):
        return value.double().expand(k, 1).contiguous().view(-1).numpy()
    return np.full(k, float(value))


def step_(plan: Plan, x: Tensor, g: Tensor, block: Block, check: bool) -> list[int] | None:
    """One step of all rows of x [k, P]; the rows left out, or None if there is no kernel for this step."""
    arrays: Values = block.states[0]
    numbers: Values = block.coefs[0]
    if any(v is None for v in arrays.values()) or not _WEIGHTS.isdisjoint(arrays):
        arrays = {n: v for n, v in arrays.items() if v is not None and n not in _WEIGHTS}
    if block.shared:
        arrays = arrays | {n: v for n, v in block.shared.items() if n in _ARRAYS}
        numbers = numbers | {n: v for n, v in block.shared.items() if n not in _ARRAYS}
    kernel = kernel_of(plan, x, arrays, numbers)
    return None if kernel is None else kernel(x, g, arrays.values(), numbers.values(), check)


def kernel_of(plan: Plan, x: Tensor, arrays: Values, numbers: Values) -> Kernel | None:
    """The compiled step of a plan on x [k, P] with inputs of these names, made once; None if it cannot be made."""
    if not (x.is_cpu and plan.elementwise and x.dtype in TYPES and x.stride(1) == 1):
        return None
    known: dict[object, Kernel | None] = plan.kernels
    key = (x.dtype, *arrays, None, *numbers)
    if key not in known:
        known[key] = _make(plan, x.dtype, tuple(arrays), tuple(numbers))
    return known[key]


def _near(a: Tensor) -> Tensor:
    """The same rows, entries of a row side by side."""
    return a if a.stride(1) == 1 else a.contiguous()


def _make(plan: Plan, dtype: torch.dtype, arrays: tuple[str, ...], numbers: tuple[str, ...]) -> Kernel | None:
    part = plan.parts[0]
    weights = {n: w for n in sorted(_WEIGHTS) if (w := getattr(part, n)) is not None}

    def step(x: Tensor, g: Tensor, *inputs: Tensor) -> None:
        given = iter(inputs)
        states: Values = dict.fromkeys((*part.rule.inputs, *_WEIGHTS))
        states |= {n: next(given) for n in (*arrays, *weights)}
        coefs = {n: next(given) for n in numbers}
        shared = {n: values.pop(n) for values in (states, coefs) for n in _SHARED if n in values}
        step_block_(plan, x, g, Block(shared, [states], [coefs]))

    sizes = [(2, 3)] * (2 + len(arrays)) + [(1, 3)] * len(weights) + [(2, 1)] * len(numbers)
    try:
        graph = emit.record(step, sizes, dtype)
        text = emit.source(graph, ["x", "g", *arrays], list(weights), numbers, gradient=1)
    except emit.NotElementwise:
        return None
    compiled = library(text, dtype)
    if compiled is None:
        return None
    return Kernel(compiled, *_runs(plan, list(weights.values())), 2 + len(arrays), len(numbers))


def _runs(plan: Plan, weights: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal weights ends, and its weights [W, R]."""
    table = torch.cat([*weights, torch.ones(1, sum(plan.segments.sizes), dtype=torch.float64)]).numpy()
    ends = np.append(np.flatnonzero((table[:, 1:] != table[:, :-1]).any(0)) + 1, table.shape[1])
    return ends.astype(np.int64), np.ascontiguousarray(table[:, ends - 1])
