"""Big arrays hold what any array holds, wherever they lie."""

import mmap
import pickle

import pytest
import torch

from fedsim import pages


@pytest.mark.parametrize("numbers", [0, 5, pages.SMALLEST // 4, pages.SMALLEST])
def test_an_array_is_writable_and_has_the_shape_and_dtype_asked_for(numbers: int) -> None:
    a = pages.empty((numbers, 2), torch.float32)
    assert a.shape == (numbers, 2) and a.dtype == torch.float32 and a.is_contiguous()
    a.fill_(3.0)
    assert float(a.sum()) == 6.0 * numbers


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("at", [0, 3])  # 3: an array that begins beside a line of the cache
def test_big_arrays_used_together_begin_apart_on_lines_of_the_cache(dtype: torch.dtype, at: int) -> None:
    first = torch.zeros(pages.SMALLEST)[at:]
    arrays = [pages.apart(first, i, (2, pages.SMALLEST), i, dtype) for i in range(8)]
    starts = [a.data_ptr() % 4096 for a in arrays]
    assert starts == [(starts[0] + i * pages.APART) % 4096 for i in range(8)]
    assert len(set(starts)) == 8 and not any(s % 64 for s in starts)
    for i, a in enumerate(arrays):
        assert a.shape == (2, pages.SMALLEST) and a.dtype == dtype and a.is_contiguous() and bool((a == i).all())


def test_small_arrays_and_those_elsewhere_have_no_room_to_spare() -> None:
    here, elsewhere = torch.zeros(3), torch.zeros(3, device="meta")
    small, meta = (
        pages.apart(here, 3, (2, 5), 7, torch.float32),
        pages.apart(elsewhere, 3, (1 << 20,), 7, torch.float32),
    )
    assert bool((small == 7).all()) and meta.device.type == "meta"
    for a in (small, meta):
        assert a.storage_offset() == 0 and a.untyped_storage().nbytes() == 4 * a.numel()


def test_rows_taken_are_those_of_indexing() -> None:
    source = torch.arange(pages.SMALLEST, dtype=torch.int64).view(-1, 4)
    rows = torch.arange(len(source)).flip(0)
    assert torch.equal(pages.take(source, rows), source[rows])


def test_an_array_outlives_the_block_it_was_made_from_and_pickles() -> None:
    source, rows = torch.ones(pages.SMALLEST, 1), torch.arange(pages.SMALLEST)
    a = pages.take(source, rows)
    del source, rows
    assert torch.equal(a, torch.ones(pages.SMALLEST, 1)) and torch.equal(pickle.loads(pickle.dumps(a[:9])), a[:9])


def test_a_kernel_without_such_pages_gives_an_ordinary_array(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Refusing(mmap.mmap):
        def madvise(self, option: int, *rest: int) -> None:
            asked.append(option)
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    a = pages.empty((pages.SMALLEST,), torch.float32).fill_(2.0)
    assert asked == [mmap.MADV_HUGEPAGE] and float(a[-1]) == 2.0
