"""Compressors made of others: each part is what it is alone."""

import pytest
import torch

from fedsim.compress.combined import Composed, PerTensor
from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.quantize import QSGD, Natural, ScaledSign
from fedsim.compress.sparsify import Bernoulli, RandK, TopK
from fedsim.params import Layout
from tests.build import streams

LAYOUT = Layout.of({"w": (7, 4), "b": (5,), "none": (0, 3)})


def drawn(rows: int, entries: int) -> torch.Tensor:
    return torch.randn(rows, entries, generator=torch.Generator().manual_seed(1))


def test_what_is_chosen_is_quantized_as_if_it_were_all() -> None:
    v, rule = drawn(3, 33), Composed(first=TopK(k=9), then=QSGD(levels=4))
    chosen = TopK(k=9).encode(v, streams(3))
    values = QSGD(levels=4).encode(chosen.payload["values"], streams(3)).decode()
    expected = torch.zeros(3, 33).scatter_(1, chosen.payload["index"].long(), values)
    assert torch.equal(rule.encode(v, streams(3)).decode(), expected)
    assert rule.bits(33) == 9 * 6 + 32 + 9 * 4  # where they stand, their norm, sign and level of each


def test_a_coarse_quantizer_is_scaled_so_that_the_whole_contracts() -> None:
    v = drawn(3, 33)
    fine, coarse = (Composed(first=TopK(k=16), then=QSGD(levels=s)) for s in (8, 1))
    assert fine.delta(33) == pytest.approx(33 / 16 / (1 - 0.25))  # omega = 16 / 8^2
    assert coarse.delta(33) == pytest.approx(33 / 16 * (1 + 4))  # omega = sqrt(16)
    largest = coarse.encode(v, streams(3)).decode().abs().amax(dim=1)
    top = TopK(k=16).encode(v, streams(3)).decode().norm(dim=1)
    assert torch.allclose(largest[largest > 0], (top / 5)[largest > 0])


def test_constants_of_unbiased_parts_multiply() -> None:
    assert Composed(first=RandK(k=11), then=Natural()).omega(33) == pytest.approx(3 * 9 / 8 - 1)


@pytest.mark.parametrize(
    ("first", "then", "why"),
    [
        (QSGD(levels=1), Natural(), "first must choose entries"),
        (TopK(k=3), RandK(k=2), "then must send all"),
        (RandK(k=3), ScaledSign(), "right on average and"),
    ],
)
def test_what_does_not_follow_one_another_is_refused(first: object, then: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Composed(first=first, then=then)  # type: ignore[arg-type]


def test_every_tensor_is_compressed_by_itself() -> None:
    v, rule = drawn(2, 33), PerTensor(of=TopK(fraction=0.2)).bind(LAYOUT)
    sent = rule.encode(v, streams(2)).decode()
    parts = [TopK(k=k).encode(part, streams(2)).decode() for part, k in ((v[:, :28], 6), (v[:, 28:], 1))]
    assert torch.equal(sent, torch.cat(parts, dim=1))
    assert rule.bits(33) == 6 * (32 + 5) + 1 * (32 + 3) and rule.delta(33) == 5.0


def test_tensors_draw_different_numbers() -> None:
    layout = Layout.of({"a": (50,), "b": (50,)})
    sent = PerTensor(of=RandK(k=10)).bind(layout).encode(torch.ones(1, 100), streams(1)).decode().view(2, 50)
    assert not torch.equal(sent[0], sent[1])


def test_matrices_in_factors_are_already_per_tensor() -> None:
    v = drawn(2, 33)
    both = PerTensor(of=PowerSGD(rank=2)).bind(LAYOUT), PowerSGD(rank=2).bind(LAYOUT)
    assert both[0].bits(33) == both[1].bits(33)
    assert not torch.equal(both[0].encode(v, streams(2)).decode(), v)
    last = [{f.name: drawn(2, f.count) for f in rule.fields(33) if f.kept} for rule in both]
    sent = [rule.encode_after(v, kept, streams(2)).decode() for rule, kept in zip(both, last, strict=True)]
    assert last[0] and torch.equal(*sent)  # after a last packet nothing is random


def test_a_coin_for_every_tensor_and_an_unknown_model_are_refused() -> None:
    with pytest.raises(ValueError, match="all or nothing"):
        PerTensor(of=Bernoulli(p=0.5)).bind(LAYOUT).bits(33)
    with pytest.raises(ValueError, match="per_tensor needs the shapes"):
        PerTensor(of=TopK(k=1)).bits(33)
