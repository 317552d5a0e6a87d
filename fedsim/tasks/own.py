"""A task of the user's own, tried on one step of its largest client before a run starts."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.config import place
from fedsim.params import Layout
from fedsim.streams import Streams
from fedsim.task import Schedule, Task


def check_task(made: object, seed: int) -> Task:
    """The task itself.

    Raises:
        ValueError: if it is no `Task`, or what it gives does not fit together.
    """
    name = type(made).__name__
    if not isinstance(made, Task):
        raise ValueError(f"gave a {name}, not a fedsim.Task; docs/tutorial/tasks.md shows what a task needs")
    try:
        n, size = made.num_examples, made.layout.size
        if not isinstance(made.layout, Layout) or n.dtype != torch.int64 or n.ndim != 1 or not bool((n > 0).any()):
            raise ValueError("num_examples must be [N] int64, above 0 for some client, and layout a Layout")
        x0 = made.init(seed)
        _expect("init", x0, (size,))
        ids = n.argmax()[None]
        batches = made.batches(ids, Streams(seed, ids, torch.zeros_like(ids)), Schedule(epochs=None, steps=1))
        if len(batches) != 1 or batches.active(0) != 1 or batches.num_steps.tolist() != [1]:
            raise ValueError("batches must give one batch for a schedule of one step; BatchPlan does")
        g, loss = made.field(x0[None].clone(), batches[0])
        _expect("field", g, (1, size))
        _expect("field's loss", loss, (1,))
    except Exception as e:  # the user's code may fail in any way
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        raise ValueError(f"{name}: {kind}{e} ({place(e, made)})") from e
    return made


def _expect(what: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        found = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{what} must give floating-point numbers {list(shape)}, not {found}")
