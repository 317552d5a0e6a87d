"""Numbers per tensor and row: the loop and the blocked form agree with each other and with plain slices."""

import pytest
import torch

from fedsim.optim import segments
from fedsim.optim.segments import Segments
from fedsim.params import Layout

LAYOUT = Layout.of({"a": (3, 50), "s": (), "k": (4, 3, 3, 3), "b": (70,), "w": (2, 5000)})
SEG = Segments.of(LAYOUT)


@pytest.mark.parametrize("seg", [SEG, SEG.rows], ids=["tensors", "rows"])
def test_loop_and_blocks_agree_with_plain_slices(seg: Segments) -> None:
    p = torch.randn(3, LAYOUT.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = p.split(list(seg.sizes), 1)
    sums, maxima = torch.stack([q.sum(1) for q in parts], 1), torch.stack([q.amax(1) for q in parts], 1)
    for got in (seg.sums(p), seg._blocked(p, "sum")):
        assert torch.allclose(got, sums, rtol=0, atol=1e-12)
    for got in (seg.maxima(p), seg._blocked(p, "max")):
        assert torch.equal(got, maxima)
    assert torch.equal(seg.expand(sums), torch.cat([q.sum(1, keepdim=True).expand_as(q) for q in parts], 1))
    assert seg.counts(p).tolist() == [[float(n) for n in seg.sizes]]


def test_rows_group_back_into_tensors() -> None:
    p = torch.ones(2, LAYOUT.size)
    assert SEG.rows_of.sums(SEG.rows.sums(p)).tolist() == [[150.0, 1.0, 108.0, 70.0, 10000.0]] * 2
    assert [tuple(view.shape) for view in SEG.views(p)] == [
        (2, 3, 50),
        (2, 1, 1),
        (2, 4, 27),
        (2, 1, 70),
        (2, 2, 5000),
    ]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_columns_agree_with_plain_slices_in_either_form(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_many_launches_hurt", lambda p: on_gpu)
    p = torch.randn(3, LAYOUT.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seg = Segments.of(LAYOUT)
    tensors = [q.unflatten(1, shape) for q, shape in zip(p.split(list(seg.sizes), 1), seg.shapes, strict=True)]
    sums = [q.sum(1, keepdim=True) for q in tensors]
    per_column = torch.cat([q.flatten(1) for q in sums], 1)
    assert torch.allclose(seg.column_sums(p), per_column, rtol=0, atol=1e-12)
    at_each = torch.cat([total.expand_as(q).flatten(1) for total, q in zip(sums, tensors, strict=True)], 1)
    assert torch.equal(seg.expand_columns(per_column), at_each)
    assert seg.column_heights(p).tolist() == [[3.0] * 50 + [1.0] + [4.0] * 27 + [1.0] * 70 + [2.0] * 5000]


@pytest.mark.parametrize("form", ["_loop", "_blocked"])
def test_a_row_of_a_stack_gives_the_bits_it_gives_alone(form: str) -> None:
    p = torch.randn(7, LAYOUT.size, generator=torch.Generator().manual_seed(1))
    together = getattr(SEG, form)(p, "sum")
    assert all(torch.equal(getattr(SEG, form)(p[i : i + 1], "sum")[0], together[i]) for i in range(7))
