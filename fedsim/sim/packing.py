"""Objects as bytes and flat buffers, so that an object store can map their tensors instead of copying them.

A parcel is a pickle (protocol 5) without its large parts, which stand beside it as byte arrays. A store that keeps
byte arrays in shared memory hands them out as read-only views; tensors of the opened parcel then lie right there, or
in private copies where somebody might write. Byte arrays that may be written to are the receiver's own, and tensors
simply lie there.

Letters: none; shapes are those of the objects.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Parcel = tuple[bytes, list[np.ndarray]]

SMALLEST_SHARED = 1 << 20  # bytes; smaller tensors are cheaper to copy than to worry about


def pack(value: Any, *, share: bool = False, pickler: type[pickle.Pickler] = pickle.Pickler) -> Parcel:
    """An object as a pickle and its buffers.

    Args:
        value: anything that the pickler takes. Tensors come back on the CPU or, if they were on a GPU, on the
            receiver's first GPU, with the order of their dimensions in memory kept.
        share: tensors of a mebibyte or more (parameters of modules aside) become views of the received buffers, which
            nobody may write to; without it every tensor of the opened parcel is the receiver's own.
        pickler: a class that also takes lambdas and classes of `__main__`, where that matters.

    Returns:
        (pickle, byte arrays), to be opened by `unpack` anywhere.

    Raises:
        pickle.PicklingError, TypeError: if some part of the object cannot be pickled.

    >>> unpack(pack({"x": torch.arange(3), "name": "c"}))
    {'x': tensor([0, 1, 2]), 'name': 'c'}
    """
    reducers: dict[type, Callable[[Any], Any]] = {
        Tensor: lambda t: _reduce(t, share),
        nn.Parameter: lambda p: (nn.Parameter, (_Whole(p.detach()), p.requires_grad)),
        _Whole: lambda w: _reduce(w.tensor, False),
        threading.local: lambda _: (threading.local, ()),  # what belongs to a thread starts empty elsewhere
        type(threading.Lock()): lambda _: (threading.Lock, ()),
        torch.device: lambda d: (torch.device, ("cuda" if d.type == "cuda" else str(d),)),
    }
    known = copyreg.dispatch_table if pickler is pickle.Pickler else pickler.dispatch_table
    table: dict[type, Callable[[Any], Any]] = {**known, **reducers}
    stream, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    # a subclass, because picklers look their table up once, when they are made
    packer = type("Packer", (pickler,), {"dispatch_table": table})
    packer(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    # read-only, for these are the sender's
    return stream.getvalue(), [np.frombuffer(b.raw().toreadonly(), dtype=np.uint8) for b in buffers]


def unpack(parcel: Parcel) -> Any:
    """The object of a parcel. A pickle may run code: only for parcels of this run's own driver and Ray workers."""
    return pickle.loads(parcel[0], buffers=parcel[1])


class _Whole:
    """A tensor that is never shared, because training loops write into parameters of modules."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Writable:
    """Makes NumPy take a read-only array for a writable one, which torch wants even of those who only read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps the memory alive
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _reduce(tensor: Tensor, share: bool) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    if tensor.layout != torch.strided:
        return tensor.__reduce_ex__(5)
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().permute(order).contiguous()
    # as_strided rather than view: a dimension of one entry may have stride 0, which a view of bytes refuses
    raw = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
    shared = share and raw.nbytes >= SMALLEST_SHARED
    return _rebuild, (raw, tensor.dtype, tuple(flat.shape), order, tensor.is_cuda, shared, tensor.requires_grad)


def _rebuild(
    raw: np.ndarray,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: list[int],
    on_gpu: bool,
    shared: bool,
    requires_grad: bool,
) -> Tensor:
    here = torch.from_numpy(np.asarray(_Writable(raw)))
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    own = here.to(device) if device == "cuda" else here if shared or raw.flags.writeable else here.clone()
    tensor = own.view(dtype).view(shape).permute([order.index(d) for d in range(len(order))])
    return tensor.requires_grad_(requires_grad) if requires_grad else tensor
