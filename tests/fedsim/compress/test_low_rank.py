import pytest
import torch

from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.sparsify import TopK
from fedsim.memory import MemoryRows
from fedsim.params import Layout
from tests.build import sender, streams

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
    cold = PowerSGD(rank=1, warm_start=False).bind(LAYOUT)
    assert cold.bits(LAYOUT.size) == bound.bits(LAYOUT.size)
    assert cold.delta(LAYOUT.size) == 5.0 and bound.delta(LAYOUT.size) is None


def test_the_error_is_that_of_a_projection() -> None:
    v = torch.randn(4, LAYOUT.size, dtype=torch.float64)
    sent = PowerSGD(rank=2).bind(LAYOUT).encode(v, streams(4)).decode()
    assert torch.allclose((sent * (v - sent)).sum(dim=1), torch.zeros(4, dtype=torch.float64), atol=1e-10)


def repeated(compressor: PowerSGD, v: torch.Tensor, times: int) -> torch.Tensor:
    """[times, C, P]: what arrives of a vector that is sent again and again, by senders that remember."""
    stored: dict[str, torch.Tensor] = {}
    out = []
    for job in range(times):
        memory = MemoryRows(stored, len(v), v.shape[1], v.device)
        out.append(sender(streams(len(v), job), memory=memory).encode(compressor, v).decode())
        stored = memory.written
    return torch.stack(out)


@pytest.mark.parametrize("shape", [(12, 5), (4, 9)], ids=["tall", "wide"])
def test_repeated_messages_come_to_the_best_matrix_of_the_rank(shape: tuple[int, int]) -> None:
    g, layout = torch.Generator().manual_seed(2), Layout.of({"w": shape})
    u, _, vh = torch.linalg.svd(torch.randn(3, *shape, generator=g, dtype=torch.float64), full_matrices=False)
    sizes = torch.tensor([4.0, 3.0, 1.5, 1.0, 0.5], dtype=torch.float64)[: min(shape)]
    v = (u * sizes @ vh).flatten(1)
    best = (u[:, :, :2] * sizes[:2] @ vh[:, :2]).flatten(1)
    warm, cold = (
        (repeated(PowerSGD(rank=2, warm_start=start, layout=layout), v, 40) - best).norm(dim=2)
        for start in (True, False)
    )
    assert float(warm[-1].max()) < 1e-9  # by (1.5 / 3)^2 a message, up to a constant
    assert bool((warm[12] < 1.2 / 4**4 * warm[8]).all()) and float(cold.min()) > 0.1


def test_a_row_without_a_last_message_begins_at_random_beside_one_that_has_one() -> None:
    layout = Layout.of({"w": (6, 4)})
    bound, g = PowerSGD(rank=1, layout=layout), torch.Generator().manual_seed(3)
    v = torch.randn(2, 24, generator=g)
    last = {"w.right": torch.tensor([[0.0] * 4, [1.0, 0.0, 0.0, 0.0]])}
    sent = bound.encode_after(v, last, streams(2)).decode().view(2, 6, 4)
    assert torch.allclose(sent[0].flatten(), bound.encode(v, streams(2)).decode()[0], atol=1e-6)
    column = v.view(2, 6, 4)[1, :, :1]  # Q = e_1 projects on the first column
    assert torch.allclose(sent[1], column @ column.T @ v.view(2, 6, 4)[1] / column.square().sum(), atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_what_is_kept_of_large_and_small_vectors_serves_the_next(scale: float) -> None:
    layout = Layout.of({"w": (6, 4)})
    v = torch.randn(1, 24, generator=torch.Generator().manual_seed(4))
    sent, scaled = (repeated(PowerSGD(rank=1, layout=layout), v * by, 5)[-1] for by in (1.0, scale))
    assert torch.allclose(scaled / scale, sent, atol=1e-4)


def test_a_message_of_zeros_or_of_what_is_not_finite_leaves_nothing_behind() -> None:
    bound, v = PowerSGD(rank=1, layout=Layout.of({"w": (6, 4)})), torch.randn(1, 24)
    for bad in (0.0, torch.nan, torch.inf):
        last = {"w.right": torch.full((1, 4), bad)}
        assert torch.equal(bound.encode_after(v, last, streams(1)).decode(), bound.encode(v, streams(1)).decode())


def test_it_must_be_bound_to_the_model_it_compresses() -> None:
    with pytest.raises(ValueError, match="bind"):
        PowerSGD(rank=1).bits(10)
    with pytest.raises(ValueError, match="bound to"):
        PowerSGD(rank=1).bind(LAYOUT).bits(10)
    with pytest.raises(ValueError, match="at least 1"):
        PowerSGD(rank=0)
    assert TopK(k=1).bind(LAYOUT) == TopK(k=1)
