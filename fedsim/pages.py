"""Where big arrays lie in memory.

A batch is gathered from rows that lie anywhere in a data set of hundreds of megabytes, and a step walks through whole
stacks of parameters. On pages of 4 kB each row costs a walk through the page table on top of the read itself; pages of
2 MB spare that where the system offers them, and elsewhere the array is an ordinary one.

An optimizer's step goes through several arrays of one size side by side. Big ones tend to begin at the same place of
their pages; then they compete for the same lines of the nearest cache, and a core that first compares the last 12 bits
of two addresses may take a read of one array for a write to another. Arrays that begin a little apart spare that.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import psutil
import torch
from torch import Tensor

from fedsim.config import ConfigError, first_line

PAGE = 1 << 21  # bytes
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE on x86 and ARM, without a name in `mmap`: more than there is may be had
SMALL_PAGE, LINE = 1 << 12, 64
SMALLEST = PAGE  # bytes; a smaller array is an ordinary one
APART = 1088  # bytes between the beginnings of arrays that are used together: 17 lines of the cache
SMALLEST_APART = 1 << 15  # bytes; smaller arrays may lie anywhere


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised array; one on the CPU that is big is put on 2 MB pages, if the system has them."""
    nbytes = prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype, device=device)
    # room to start and to end with a whole page; what is never touched takes no memory
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    block = mmap.mmap(-1, (nbytes // PAGE + 2) * PAGE, flags=flags)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        pass
    whole = torch.frombuffer(block, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + nbytes].view(dtype).view(*shape)


@contextmanager
def room_on_gpu(what: str, way_out: str) -> Iterator[None]:
    """Say what has no room, and the way out, where a GPU is full.

    Raises:
        ConfigError: instead of torch's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise ConfigError(f"{what} no room on the GPU ({first_line(e)}); {way_out}") from e


def apart(first: Tensor, nth: int, shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
    """An array full of `value` on the device of `first`, the nth that is used together with it.

    On the CPU a big one begins nth * `APART` bytes further into a page than `first` does, and on a line of the cache.
    """
    numel, size = prod(shape), dtype.itemsize
    if first.device.type != "cpu" or numel * size < SMALLEST_APART:
        return torch.full(tuple(shape), value, dtype=dtype, device=first.device)
    room = torch.full((numel + SMALL_PAGE // size,), value, dtype=dtype)
    skipped = (first.data_ptr() + nth * APART - room.data_ptr()) % SMALL_PAGE // LINE * LINE
    return room[skipped // size :][:numel].view(*shape)


def take(source: Tensor, rows: Tensor) -> Tensor:
    """source[rows], on such pages."""
    out = empty((len(rows), *source.shape[1:]), source.dtype, source.device)
    return torch.index_select(source, 0, rows, out=out)


def room_for(nbytes: int) -> bool:
    """Whether so much fits into the memory that is free, and leaves as much for the rest."""
    return 2 * nbytes < psutil.virtual_memory().available


def keep_freed_memory() -> None:
    """Ask glibc to keep big freed blocks instead of giving them back.

    Gradients of a stack are tens of megabytes and live for one step; given back and faulted in anew each time they
    cost up to twice the step itself. All threads share one heap, because glibc gives those of other threads back
    whatever it is told. No effect where the C library is another one.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX
    except (OSError, AttributeError):
        pass
