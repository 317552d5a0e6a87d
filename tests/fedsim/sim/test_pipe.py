"""What two processes hand each other arrives as it was, unopened."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fedsim.sim.packing import Parcel, pack
from fedsim.sim.pipe import NOTHING, Pipe


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
        sent.append((buffers, got))
    for buffers, got in sent:  # later parcels have not written over those of earlier ones
        assert all(np.array_equal(a, b) and b.flags.writeable for a, b in zip(buffers, got, strict=True))


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
