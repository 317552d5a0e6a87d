"""An elementwise step as one pass over memory, in compiled C++: the fastest back end of a CPU.

A call takes a few microseconds, the look for gradients that are not finite finds its numbers in the cache, and the GIL
is free meanwhile. It suits no step that `emit` cannot write, and none on a machine without a compiler.

Letters: k clients that step, P coordinates.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Collection, Iterable
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.native import TYPES, library
from fedsim.optim.backends import emit
from fedsim.optim.groups import Factors, Recipe, Values
from fedsim.optim.segments import Segments
from fedsim.optim.step import Block, step_block_

_WEIGHTS = {"lr_weights", "decay_weights", "l2_weights"}
_SHARED = ("average", "average_rate", "average_first")
_MANY = 1 << 16  # entries from which several threads pay
_RECORDING = Lock()  # workers are threads, and torch records for one at a time


class Emitted:
    """`backend: compiled` on a CPU."""

    name, automatic = "compiled", True

    def suits(self, recipe: Recipe, x: Tensor, block: Block) -> bool:
        """Steps whose coordinates do not see each other, as far as they can be written in C++ and compiled here."""
        fits = x.is_cpu and recipe.alone and x.dtype in TYPES and x.stride(1) == 1
        return fits and kernel_of(recipe, x.dtype, *_inputs(block)) is not None

    def step(self, recipe: Recipe, x: Tensor, g: Tensor, block: Block) -> list[int]:
        """One step of all rows; returns those left out."""
        arrays, numbers = _inputs(block)
        kernel = kernel_of(recipe, x.dtype, arrays, numbers)
        assert kernel is not None
        return kernel(x, g, arrays.values(), numbers.values(), recipe.settings.skip_nonfinite)


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
        k, p = shape = x.shape
        taken = [x]
        for a in (g, *arrays):  # none may be shorter than x, or memory behind it is touched
            if a.shape != shape and a.shape != (1, p) or a.dtype is not x.dtype:
                raise ValueError(f"a step on {list(shape)} of {x.dtype} got an input {list(a.shape)} of {a.dtype}")
            a = a if a.stride(1) == 1 else a.contiguous()
            taken.append(a if k == 1 or a.shape == shape else a.expand(k, p))  # one row for all has stride 0
        pointers = self._pointers(*[a.data_ptr() for a in taken])
        strides = self._strides(*[a.stride(0) for a in taken])
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


def _inputs(block: Block) -> tuple[Values, Values]:
    """The arrays and the numbers that a kernel takes, weights left out."""
    arrays = {n: v for n, v in block.states[0].items() if v is not None}
    if not block.shared:
        return arrays, block.coefs[0]
    numbers = {n: v for n, v in block.shared.items() if n != "average"}
    return arrays | {"average": block.shared["average"]}, block.coefs[0] | numbers


def kernel_of(recipe: Recipe, dtype: torch.dtype, arrays: Values, numbers: Values) -> Kernel | None:
    """The compiled step of a recipe with inputs of these names, made once; None if it cannot be made."""
    key = (dtype, *arrays, None, *numbers)
    if key not in recipe.compiled:
        with _RECORDING:
            if key not in recipe.compiled:
                recipe.compiled[key] = _make(recipe, dtype, tuple(arrays), tuple(numbers))
    found: Kernel | None = recipe.compiled[key]
    return found


def _make(recipe: Recipe, dtype: torch.dtype, arrays: tuple[str, ...], numbers: tuple[str, ...]) -> Kernel | None:
    group = recipe.groups[0]
    given = {"lr_weights": group.lr_factors, "decay_weights": group.decay_factors, "l2_weights": group.l2_factors}
    weights = {n: w for n, w in given.items() if w is not None}

    def step(x: Tensor, g: Tensor, *inputs: Tensor) -> None:
        values = iter(inputs)
        states: Values = dict.fromkeys((*group.rule.inputs, *_WEIGHTS))
        states |= {n: next(values) for n in (*arrays, *weights)}
        coefs = {n: next(values) for n in numbers}
        shared = {n: values.pop(n) for values in (states, coefs) for n in _SHARED if n in values}
        step_block_(recipe, x, g, Block(shared, [states], [coefs]))

    sizes = [(2, 3)] * (2 + len(arrays)) + [(1, 3)] * len(weights) + [(2, 1)] * len(numbers)
    try:
        graph = emit.record(step, sizes, dtype)
        text = emit.source(graph, ["x", "g", *arrays], list(weights), numbers, gradient=1)
    except emit.NotElementwise:
        return None
    compiled = library(text, dtype)
    if compiled is None:
        if recipe.settings.backend == "compiled":
            _warn()
        return None
    return Kernel(compiled, *_runs(group.segments, list(weights.values())), 2 + len(arrays), len(numbers))


@cache
def _warn() -> None:
    warnings.warn(
        "optimizer.backend: compiled: no C++ compiler works here (CXX, g++, clang++); steps are eager", stacklevel=2
    )


def _runs(segments: Segments, weights: list[Factors]) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal weights ends, and its weights [W, R]."""
    table = np.array([*weights, [1.0] * len(segments.sizes)])
    last = np.append((table[:, 1:] != table[:, :-1]).any(0), True)
    return np.cumsum(segments.sizes, dtype=np.int64)[last], np.ascontiguousarray(table[:, last])
