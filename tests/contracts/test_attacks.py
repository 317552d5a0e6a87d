"""What every attack of the table must keep."""

import pickle

import pytest
import torch

from fedsim.clients.byzantine import ATTACKS
from fedsim.sim.byzantine import Knowledge
from fedsim.streams import Streams


def attack(name: str, honest: torch.Tensor, b: int) -> torch.Tensor | None:
    streams = Streams(1, torch.arange(b), torch.zeros(b, dtype=torch.int64))
    own = vectors(b + 1)[1:]
    return ATTACKS[name]()(honest, b, streams, Knowledge(step=3, own=own))


def vectors(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("rows", "b"), [(5, 2), (1, 3), (4, 0)])
def test_it_sends_one_vector_a_client_or_nothing(name: str, rows: int, b: int) -> None:
    honest = vectors(rows)
    before = honest.clone()
    out = attack(name, honest, b)
    assert torch.equal(honest, before)
    assert out is None or (out.shape == (b, 7) and out.dtype == torch.float64)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_key_sends_the_same(name: str) -> None:
    first, again = attack(name, vectors(), 2), attack(name, vectors(), 2)
    assert (first is None) == (again is None)
    assert first is None or again is None or torch.equal(first.nan_to_num(), again.nan_to_num())


@pytest.mark.parametrize("name", ATTACKS)
def test_it_pickles(name: str) -> None:
    made = ATTACKS[name]()
    assert pickle.loads(pickle.dumps(made)) == made
