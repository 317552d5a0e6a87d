"""What a round costs in vectors of the model's size, down and up, for each client that takes part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedsim.compress.sparsify import RandK
from fedsim.sim.links import Uplink
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.dsgd import DSGD
from fedsim.strategies.extragradient import Extragradient
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m import FedAvgM
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedbuff_stream import FedBuffStream
from fedsim.strategies.fedcm import FedCM
from fedsim.strategies.feddyn import FedDyn
from fedsim.strategies.fedfix import FedFix
from fedsim.strategies.fednova import FedNova
from fedsim.strategies.fedprox import FedProx
from fedsim.strategies.monna import Monna
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.scaffold_m import ScaffoldM
from fedsim.strategies.scaffold_m_vr import ScaffoldMVR
from tests.build import Clocks, Play, drawn, local_sgd, saddle

VECTOR = 32 * 3  # bits of a model of three numbers


def _bits(play: Play) -> tuple[int, int]:
    """(down, up) of the next round."""
    down, up = play.fleet.ledger.bits_down, play.fleet.ledger.bits_up
    play.step()
    return play.fleet.ledger.bits_down - down, play.fleet.ledger.bits_up - up


@pytest.mark.parametrize(
    "kind, down, up",
    [
        (FedAvg, 1, 1),
        (FedAvgM, 2, 1),
        (FedAvgMVR, 3, 1),  # x, x_prev and g
        (Scaffold, 2, 2),
        (ScaffoldM, 3, 2),
        (ScaffoldMVR, 4, 2),
        (FedCM, 2, 1),
        (FedProx, 1, 1),
        (FedDyn, 1, 1),
    ],
)
@pytest.mark.parametrize("size", [None, 2])
def test_synchronous_round(kind: type, down: int, up: int, size: int | None) -> None:
    task = drawn(5, 3)
    play = Play.start(task, kind(cohort_size=size, local=local_sgd(task, steps=2)))
    for _ in range(3):
        assert _bits(play) == ((size or 5) * down * VECTOR, (size or 5) * up * VECTOR)


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_fednova_sends_one_number_beside_its_vector(mu: float) -> None:
    task = drawn(5, 3)
    strategy = FedNova(cohort_size=2, mu=mu, local=local_sgd(task, steps=2))
    play = Play.start(task, strategy, devices=Clocks((0.0,) * 5, uplink=10.0), reply_bits=VECTOR)
    assert _bits(play) == (2 * VECTOR, 2 * (VECTOR + 32))
    assert play.fleet.now == pytest.approx((VECTOR + 32) / 10.0)


def test_scaffold_with_option_one_sends_no_more() -> None:
    task = drawn(5, 3)
    play = Play.start(task, Scaffold(option="I", local=local_sgd(task, steps=2)))
    assert _bits(play) == (5 * 2 * VECTOR, 5 * 2 * VECTOR)


@pytest.mark.parametrize(
    "make, replies",
    [
        (lambda local: AsyncFedAvg(local=local), [1, 1, 1, 1]),
        (lambda local: FedAsync(local=local), [1, 1, 1, 1]),
        (lambda local: FedFix(interval=1.0, local=local), [3, 3, 3, 3]),
        (lambda local: FedFix(interval=0.5, local=local), [1, 3, 1, 3]),  # two idle half of the time
        (lambda local: FedBuff(buffer_size=2, local=local), [2, 2, 2, 2]),
        (lambda local: FedBuffStream(buffer_size=2, concurrency=3, local=local), [2, 2, 2, 2]),
    ],
    ids=["async", "fedasync", "fedfix 1", "fedfix .5", "fedbuff", "stream"],
)
def test_a_contribution_costs_one_vector_each_way(make: Callable[..., Any], replies: list[int]) -> None:
    task = drawn(3, 3)
    play = Play.start(task, make(local_sgd(task, 0.01, steps=2)), devices=Clocks((1.0, 0.9, 0.5)))
    sent = 0
    for n in replies:
        down, up = _bits(play)
        assert up == n * VECTOR
        sent += down
    in_flight = len(play.fleet.queue)
    assert sent == (sum(replies) + in_flight) * VECTOR


@pytest.mark.parametrize("kind", [DSGD, Monna])
def test_peers_send_and_receive_one_vector_for_every_other_node(kind: type) -> None:
    task = drawn(5, 3)
    play = Play.start(task, kind(local=local_sgd(task, steps=1)))
    assert _bits(play) == (5 * 4 * VECTOR + 5 * VECTOR, 5 * 4 * VECTOR)  # and the start, once
    assert _bits(play) == (5 * 4 * VECTOR, 5 * 4 * VECTOR)  # everybody knows the step's rate from the file


def test_extragradient_exchanges_twice() -> None:
    task = saddle(5, 6)
    play = Play.start(task, Extragradient(lr=0.1), x0=torch.zeros(12, dtype=torch.float64))
    assert _bits(play) == (5 * 2 * 32 * 12, 5 * 2 * 32 * 12)


@pytest.mark.parametrize(
    "kind, whole",
    [
        (FedAvg, 0),
        (FedAvgM, 0),
        (FedCM, 0),
        (FedProx, 0),
        (FedNova, 32),
        (Scaffold, VECTOR),
        (ScaffoldM, VECTOR),
        (ScaffoldMVR, VECTOR),
    ],
)
def test_a_compressed_uplink_costs_what_its_packets_do_and_drives_the_clock(kind: type, whole: int) -> None:
    task = drawn(4, 3)
    rand = RandK(k=1)
    packet = 32 + 2  # one number and an index of two bits
    play = Play.start(
        task,
        kind(local=local_sgd(task, 0.01, steps=2)),
        uplink=Uplink(compressor=rand),
        devices=Clocks((0.0,) * 4, uplink=10.0),
    )
    assert _bits(play)[1] == 4 * (packet + whole)
    assert play.fleet.now == pytest.approx((packet + whole) / 10.0)
