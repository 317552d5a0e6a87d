"""Samples that lie on the host, on their way to the GPU that computes with them.

They are gathered into page-locked ("pinned") memory and copied on a stream of their own. Nobody waits for the copy but
the kernels that read it, and the host gathers a minibatch while the GPU still works on the one before. So the data set
itself need not be page-locked: it may be a file that is mapped into memory, or lie in the store that several Ray
workers of a machine share.

torch keeps page-locked memory that was let go until its copy is done (Note [HostAllocator design] of its
CachingHostAllocator.h), and the GPU's until the stream named by `record_stream` has read it.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import cache

import torch
from torch import Tensor

from fedsim.trees import Tree, each, pick

AHEAD = 2  # transfers that the GPU has not come to yet, which bounds the memory of batches under way


class Resident:
    """Reads samples from where they lie."""

    def __call__(self, pool: Tree, which: slice | Tensor) -> Tree:
        """The samples at rows [...] of a pool, a copy [..., ...]; of a slice they are a view."""
        if isinstance(which, slice):
            return pick(pool, which)
        return each(lambda t: t.index_select(0, which.reshape(-1)).view(*which.shape, *t.shape[1:]), pool)


class Staged:
    """Reads samples from the host for the steps and evaluations of any thread, on a GPU.

    Args:
        device: the GPU, of CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()

    def __call__(self, pool: Tree, which: slice | Tensor) -> Tree:
        """See `Resident`; a copy in any case. Rows lie on the host."""
        turns = self._local.__dict__.setdefault("turns", deque[torch.cuda.Event]())
        turns.append(torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(blocking=True)))
        if len(turns) > AHEAD:
            turns.popleft().synchronize()
        return each(lambda t: self._sent(_gathered(t, which)), pool)

    def _sent(self, here: Tensor) -> Tensor:
        copies, reader = _copies(self._device), torch.cuda.current_stream(self._device)
        with torch.cuda.stream(copies):
            there = here.to(self._device, non_blocking=True)
        reader.wait_stream(copies)
        there.record_stream(reader)
        return there


Reader = Resident | Staged


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies to a GPU: it has one engine for them.

    It has a priority, since torch hands out its 32 streams without one in turn: in a process of many runs another
    thread could come to capture a graph on this one.
    """
    return torch.cuda.Stream(device, priority=-1)


def _gathered(source: Tensor, which: slice | Tensor) -> Tensor:
    """The samples in fresh page-locked memory."""
    if isinstance(which, slice):
        rows = source[which]
        return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows)
    out = torch.empty(which.numel(), *source.shape[1:], dtype=source.dtype, pin_memory=True)
    return torch.index_select(source, 0, which.reshape(-1), out=out).view(*which.shape, *source.shape[1:])
