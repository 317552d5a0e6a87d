"""Seeds: coordinates along directions that both ends draw."""

import pytest
import torch

from fedsim.compress.seeds import Seeds
from fedsim.params import Layout
from tests.build import streams


def test_what_lies_in_the_span_of_the_directions_comes_back_and_costs_a_number_for_each() -> None:
    own = streams(3, job=2)
    z = torch.stack([own.normal("optimizer direction 0", 500, step=t) for t in (1, 2, 3, 4)], dim=1)
    numbers = torch.tensor([[0.1, -0.3, 0.0, 2.0]]).expand(3, -1)
    v = (numbers[:, None] @ z)[:, 0]
    packet = Seeds(steps=4).encode(v, own)
    torch.testing.assert_close(packet.payload["values"], numbers, rtol=0, atol=1e-6)
    torch.testing.assert_close(packet.decode(), v, rtol=0, atol=1e-5)
    assert packet.bits.tolist() == [4 * 32] * 3


def test_the_error_is_that_of_a_projection() -> None:
    v = torch.randn(4, 60, dtype=torch.float64)
    sent = Seeds(steps=3).encode(v, streams(4)).decode()
    assert torch.allclose((sent * (v - sent)).sum(dim=1), torch.zeros(4, dtype=torch.float64), atol=1e-10)


def test_buffers_are_sent_as_they_are() -> None:
    layout = Layout(("w", "mean"), ((8,), (3,)), ("vector", "vector"), num_buffers=1)
    v, bound = torch.randn(2, 11), Seeds(steps=2).bind(layout)
    assert torch.equal(bound.encode(v, streams(2)).decode()[:, 8:], v[:, 8:])
    assert bound.bits(11) == 32 * (2 + 3) and bound.delta(11) == 4.0


def test_more_directions_than_entries_and_none_are_refused() -> None:
    with pytest.raises(ValueError, match="6 directions exceed the 5 entries"):
        Seeds(steps=3, directions=2).bits(5)
    with pytest.raises(ValueError, match="at least one step"):
        Seeds(steps=0)
