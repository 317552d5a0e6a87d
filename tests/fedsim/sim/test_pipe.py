"""What two processes hand each other arrives as it was, unopened."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.sim.packing import Parcel, pack
from fedsim.sim.pipe import LARGE, NOTHING, Pipe


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, Pipe]]:
    a, b = (Pipe(end) for end in socket.socketpair())
    yield a, b
    a.close()
    b.close()


def through(here: Pipe, there: Pipe, said: Any, parcel: Parcel = NOTHING) -> tuple[Any, Parcel]:
    """What comes out at the other end."""
    sender = threading.Thread(target=here.send, args=(said, parcel))
    sender.start()
    got = there.receive()
    sender.join()
    return got


SIZES = (0, 1, 1000, 3 << 20, (3 << 20) + 7)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_parcel_arrives_as_it_was_in_buffers_of_the_receivers_own(ends: tuple[Pipe, Pipe], turn: int) -> None:
    rng, sent = np.random.default_rng(0), []
    for _ in range(3):
        buffers = [rng.integers(0, 256, size, dtype=np.uint8) for size in SIZES]
        said, (stream, got) = through(*ends[::turn], ("question", 3), (b"not a pickle", buffers))
        assert said == ("question", 3) and stream == b"not a pickle"
        sent.append((buffers, [array[:] for array in got]))  # views, whose arrays are gone
        del got
    for buffers, views in sent:  # later parcels have not written over those of earlier ones
        assert all(np.array_equal(a, b) and b.flags.writeable for a, b in zip(buffers, views, strict=True))


def test_memory_that_is_given_back_is_taken_again_and_what_fits_nothing_is_let_go(ends: tuple[Pipe, Pipe]) -> None:
    here, there = ends

    def place(size: int) -> int:
        """Where a buffer arrives that nobody keeps."""
        buffer = np.full(size, size % 251, dtype=np.uint8)
        _, (_, (got,)) = through(here, there, None, (b"", [buffer]))
        assert np.array_equal(got, buffer)
        found = got.ctypes.data
        del got
        through(there, here, None)
        return int(found)

    first = place(3 * LARGE)
    assert place(4 * LARGE) == place(3 * LARGE + 1) == first
    assert len(here._mine) == len(there._theirs) == 1
    place(5 * LARGE)
    assert len(here._mine) == len(there._theirs) == 1
    here.shrink()
    through(here, there, None)
    assert len(here._mine) == len(there._theirs) == 0


def test_more_large_buffers_than_there_may_be_segments_arrive_as_well(
    ends: tuple[Pipe, Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.sim.pipe.MOST", 2)
    for _ in range(2):
        buffers = [np.full(LARGE + i, i, dtype=np.uint8) for i in range(4)]
        _, (_, got) = through(*ends, None, (b"", buffers))
        assert all(np.array_equal(a, b) for a, b in zip(buffers, got, strict=True))
        assert len(ends[0]._mine) == len(ends[1]._theirs) == 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="how else to see open files")
def test_nothing_of_it_is_left_when_both_ends_are_gone() -> None:
    def there_and_gone() -> None:
        here, there = (Pipe(end) for end in socket.socketpair())
        _, (_, got) = through(here, there, None, (b"", [np.zeros(2 * LARGE, dtype=np.uint8)]))
        assert got[0].nbytes == 2 * LARGE and len(os.listdir("/proc/self/fd")) > before
        here.close()
        there.close()

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    there_and_gone()
    assert len(os.listdir("/proc/self/fd")) == before


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("it was opened",)


def test_what_is_in_a_parcel_is_not_opened(ends: tuple[Pipe, Pipe]) -> None:
    parcel = pack(Bomb())
    assert through(*ends, None, parcel) == (None, parcel)


def test_an_end_that_is_gone_is_an_error_for_the_other(ends: tuple[Pipe, Pipe]) -> None:
    ends[0].close()
    with pytest.raises(EOFError, match="the other end is closed"):
        ends[1].receive()
    with pytest.raises(ConnectionError):
        ends[1].send(None)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="how else to see open files")
def test_a_sending_that_fails_leaves_no_file_but_its_segments(ends: tuple[Pipe, Pipe]) -> None:
    ends[0].close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConnectionError):
        ends[1].send(None, (b"", [np.zeros(LARGE, dtype=np.uint8)]))
    assert len(os.listdir("/proc/self/fd")) == before + len(ends[1]._mine)


def test_so_is_one_that_goes_in_the_middle_of_a_parcel(
    ends: tuple[Pipe, Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "send_fds", lambda *_: ends[0].close())
    ends[0].send(None, (b"", [np.zeros(LARGE, dtype=np.uint8)]))
    with pytest.raises(EOFError, match="the other end is closed"):
        ends[1].receive()
