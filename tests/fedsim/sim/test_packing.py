from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.sim.packing import SMALLEST_SHARED, Parcel, pack, unpack

BIG = SMALLEST_SHARED // 4  # float32 entries


def frozen(parcel: Parcel) -> Parcel:
    """The parcel as an object store hands it out: read-only."""
    for array in parcel[1]:
        array.flags.writeable = False
    return parcel


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.arange(6).view(2, 3),
        torch.randn(5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        torch.tensor([1 + 2j]),
        torch.ones(1, 3).expand(4, 3),
        torch.tensor(2.0).expand(1),
        torch.arange(6.0)[2:].view(2, 2)[1:].expand(1, 2),
        torch.arange(60.0).view(3, 4, 5)[:, ::2],
        torch.eye(3).to_sparse(),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_a_tensor_of_any_kind_survives(tensor: Tensor) -> None:
    got = unpack(frozen(pack({"x": tensor})))["x"]
    assert got.dtype == tensor.dtype and got.shape == tensor.shape and got.layout == tensor.layout
    assert torch.equal(got.to_dense(), tensor.to_dense())


def test_the_order_of_dimensions_in_memory_survives() -> None:
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert unpack(pack(images)).stride() == images.stride()


def test_large_shared_tensors_lie_in_the_received_buffer_and_small_ones_do_not() -> None:
    large, small = torch.arange(float(BIG)), torch.arange(4.0)
    parcel = frozen(pack([large, small], share=True))
    got = unpack(parcel)
    buffers = {a.ctypes.data for a in parcel[1]}
    assert got[0].data_ptr() in buffers and got[1].data_ptr() not in buffers
    assert torch.equal(got[0], large) and torch.equal(got[1], small)


def test_unshared_tensors_are_the_receivers_own() -> None:
    x = torch.arange(float(BIG))
    got = unpack(frozen(pack(x)))
    got += 1
    assert torch.equal(got, x + 1) and x[0] == 0


def test_what_is_received_in_buffers_of_its_own_lies_there_and_the_senders_tensors_are_safe() -> None:
    x = torch.arange(4.0)
    stream, buffers = pack(x)
    (mine,) = (array.copy() for array in buffers)
    got = unpack((stream, [mine]))
    assert torch.equal(got, x) and got.data_ptr() == mine.ctypes.data
    same = unpack(pack(x))
    same += 1
    assert x.tolist() == [0, 1, 2, 3]


def test_parameters_are_never_shared_and_tied_ones_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(1, BIG, bias=False), nn.Linear(1, BIG, bias=False))
    module[1].weight = module[0].weight
    parcel = frozen(pack(module, share=True))
    got = unpack(parcel)
    assert got[0].weight is got[1].weight
    assert isinstance(got[0].weight, nn.Parameter) and got[0].weight.requires_grad
    assert got[0].weight.data_ptr() not in {a.ctypes.data for a in parcel[1]}


def test_a_shared_parcel_holds_the_bytes_of_its_tensors_once() -> None:
    x = torch.zeros(BIG)
    parcel = pack({"a": x, "b": x}, share=True)
    assert sum(a.nbytes for a in parcel[1]) == 4 * BIG
    assert len(parcel[0]) < 1000


def test_what_cannot_be_pickled_says_so() -> None:
    with pytest.raises((pickle.PicklingError, TypeError, AttributeError)):
        pack({"f": lambda x: x})


def test_what_belongs_to_a_thread_starts_empty() -> None:
    cache = threading.local()
    cache.buffer = torch.zeros(3)
    got = unpack(pack({"cache": cache, "lock": threading.Lock()}))
    assert not hasattr(got["cache"], "buffer")
    assert got["lock"].acquire(blocking=False)


def test_numpy_arrays_travel_beside_the_pickle() -> None:
    got = unpack(pack(np.arange(1000)))
    assert np.array_equal(got, np.arange(1000))
