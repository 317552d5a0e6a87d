"""What every attack of the table must keep."""

import pickle

import pytest
import torch

from fedsim.clients.byzantine import ATTACKS
from fedsim.sim.byzantine import Knowledge
from fedsim.streams import Streams

TO_EACH = [name for name, cls in ATTACKS.items() if hasattr(cls, "to_each")]  # every peer something else
TO_ALL = [name for name in ATTACKS if name not in TO_EACH]


def attack(name: str, honest: torch.Tensor, b: int) -> torch.Tensor | None:
    streams = Streams(1, torch.arange(b), torch.zeros(b, dtype=torch.int64))
    own = vectors(b + 1)[1:]
    return ATTACKS[name]()(honest, b, streams, Knowledge(step=3, own=own))


def vectors(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", TO_ALL)
@pytest.mark.parametrize(("rows", "b"), [(5, 2), (1, 3), (4, 0)])
def test_it_sends_one_vector_a_client_or_nothing(name: str, rows: int, b: int) -> None:
    honest = vectors(rows)
    before = honest.clone()
    out = attack(name, honest, b)
    assert torch.equal(honest, before)
    assert out is None or (out.shape == (b, 7) and out.dtype == torch.float64)


@pytest.mark.parametrize("name", TO_ALL)
def test_the_same_key_sends_the_same(name: str) -> None:
    first, again = attack(name, vectors(), 2), attack(name, vectors(), 2)
    assert (first is None) == (again is None)
    assert first is None or again is None or torch.equal(first.nan_to_num(), again.nan_to_num())


@pytest.mark.parametrize("name", TO_EACH)
def test_it_tells_each_peer_one_vector_and_a_server_nothing(name: str) -> None:
    own, mean, weight = vectors(), vectors().flip(0), torch.linspace(0.1, 0.9, 5).double()
    before = own.clone(), mean.clone()
    streams = Streams(1, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    out = ATTACKS[name]().to_each(own, mean, weight, streams, Knowledge())
    assert out.shape == own.shape and out.dtype == own.dtype
    assert torch.equal(own, before[0]) and torch.equal(mean, before[1])
    with pytest.raises(ValueError, match="take a strategy without one"):
        attack(name, vectors(), 2)


@pytest.mark.parametrize("name", ATTACKS)
def test_it_pickles(name: str) -> None:
    made = ATTACKS[name]()
    assert pickle.loads(pickle.dumps(made)) == made
