"""Keyed random numbers: known answers, independence of rows, and the shape of the distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedsim.streams import _GOLDEN, Streams, mix64, server_rng
from tests.build import streams


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 1234567, as published with its reference implementation.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = mix64(1234567 + torch.arange(1, 5) * _GOLDEN)
    assert [int(g) & (2**64 - 1) for g in got] == expected


def test_a_row_does_not_depend_on_its_place_in_the_stack() -> None:
    stack, alone = streams([4, 9, 2]), streams([9])
    assert torch.equal(stack.normal("z", 7)[1], alone.normal("z", 7)[0])
    assert torch.equal(stack.bits("z", 7)[1], alone.bits("z", 7)[0])


@pytest.mark.parametrize(
    "other",
    [streams([3], job=1), streams([4]), streams([3], seed=1)],
    ids=["job", "client", "seed"],
)
def test_every_part_of_the_key_matters(other: Streams) -> None:
    assert not (other.bits("z", 100) == streams([3]).bits("z", 100)).any()


def test_purpose_and_step_are_parts_of_the_key() -> None:
    s = streams([3])
    assert not (s.bits("a", 100) == s.bits("b", 100)).any()
    assert not (s.bits("a", 100, step=1) == s.bits("a", 100, step=2)).any()


def test_uniform_fills_its_bins_evenly() -> None:
    u = streams(list(range(100))).uniform("u", 1000).flatten()
    assert 0 <= float(u.min()) and float(u.max()) < 1
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 63) < 5 * math.sqrt(2 * 63)


def test_neighbouring_clients_are_uncorrelated() -> None:
    z = streams(list(range(200))).normal("z", 2000).double()
    corr = (z[:-1] * z[1:]).mean(1)
    assert float(corr.abs().max()) < 5 / math.sqrt(2000)
    assert float(corr.mean().abs()) < 5 / math.sqrt(2000 * 199)


def test_normal_has_the_moments_of_a_normal() -> None:
    z = streams(list(range(100))).normal("z", 2001).double().flatten()
    n = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(n)
    assert abs(float((z**2).mean()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / n)


def test_rademacher_is_plus_or_minus_one() -> None:
    r = streams([1, 2]).rademacher("r", 10_000)
    assert set(r.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(r.mean())) < 5 / math.sqrt(20_000)


def test_permutations_are_permutations_of_each_clients_own_samples() -> None:
    counts = torch.tensor([5, 0, 3])
    p = streams([1, 2, 3]).permutation("p", counts)
    assert p.shape == (3, 5)
    assert sorted(p[0].tolist()) == [0, 1, 2, 3, 4]
    assert sorted(p[2, :3].tolist()) == [0, 1, 2]


def test_every_permutation_of_three_is_equally_likely() -> None:
    p = streams(list(range(6000))).permutation("p", torch.full((6000,), 3))
    _, counts = torch.unique(p, dim=0, return_counts=True)
    assert len(counts) == 6
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 5 + 5 * math.sqrt(10)


def test_a_permutation_does_not_depend_on_the_stack_width() -> None:
    wide = streams([7, 8]).permutation("p", torch.tensor([4, 9]))
    alone = streams([7]).permutation("p", torch.tensor([4]))
    assert torch.equal(wide[0, :4], alone[0])


def test_the_servers_generator_is_keyed_by_seed_purpose_and_round() -> None:
    draw = lambda *key: server_rng(*key).integers(1 << 60, size=4)  # noqa: E731
    assert np.array_equal(draw(0, "server", 3), draw(0, "server", 3))
    for other in [(1, "server", 3), (0, "task", 3), (0, "server", 4)]:
        assert not np.array_equal(draw(0, "server", 3), draw(*other))
