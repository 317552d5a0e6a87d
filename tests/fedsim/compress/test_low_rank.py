import pytest
import torch

from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.sparsify import TopK
from fedsim.params import Layout
from tests.build import streams

LAYOUT = Layout.of({"w": (12, 5), "b": (5,), "conv": (4, 2, 3, 3), "small": (2, 2)})


def test_matrices_of_the_rank_and_vectors_come_back_exactly() -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(3, LAYOUT.size, generator=g, dtype=torch.float64)
    views = LAYOUT.views(v)
    for name, (a, b) in {"w": (12, 5), "conv": (4, 18)}.items():
        left, right = torch.randn(3, a, 2, generator=g).double(), torch.randn(3, 2, b, generator=g).double()
        views[name].copy_((left @ right).view(3, *views[name].shape[1:]))
    assert torch.allclose(PowerSGD(rank=2).bind(LAYOUT).encode(v, streams(3)).decode(), v, atol=1e-10)


def test_bits_are_those_of_two_factors_and_of_what_is_sent_whole() -> None:
    bound = PowerSGD(rank=1).bind(LAYOUT)
    assert bound.bits(LAYOUT.size) == 32 * ((12 + 5) + 5 + (4 + 18) + 4)  # rank 1 would not shrink a 2 x 2 matrix
    assert bound.delta(LAYOUT.size) == 5.0


def test_the_error_is_that_of_a_projection() -> None:
    v = torch.randn(4, LAYOUT.size, dtype=torch.float64)
    sent = PowerSGD(rank=2).bind(LAYOUT).encode(v, streams(4)).decode()
    assert torch.allclose((sent * (v - sent)).sum(dim=1), torch.zeros(4, dtype=torch.float64), atol=1e-10)


def test_it_must_be_bound_to_the_model_it_compresses() -> None:
    with pytest.raises(ValueError, match="bind"):
        PowerSGD(rank=1).bits(10)
    with pytest.raises(ValueError, match="bound to"):
        PowerSGD(rank=1).bind(LAYOUT).bits(10)
    with pytest.raises(ValueError, match="at least 1"):
        PowerSGD(rank=0)
    assert TopK(k=1).bind(LAYOUT) == TopK(k=1)
