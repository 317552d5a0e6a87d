"""Compressed links: error feedback on the way up, running copies and missed messages on the way down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.packet import Compressor
from fedsim.compress.quantize import QSGD
from fedsim.compress.sparsify import Bernoulli, RandK, TopK
from fedsim.fleet import Cost
from fedsim.params import Layout
from fedsim.sim.devices import Constant
from fedsim.sim.links import Downlink, Uplink
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.scaffold import Scaffold
from fedsim.streams import Streams
from tests.build import Clocks, Play, build_fleet, drawn, local_sgd, play, watched

WHOLE = 32 * 4
PACKET = 32 + 2  # Top-1 of four: a number and an index of two bits


def _v(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _ids(*clients: int) -> Tensor:
    return torch.tensor(clients, dtype=torch.int64)


# Down ------------------------------------------------------------------------------------------------------------


def test_the_first_message_is_whole_and_later_ones_are_compressed_changes() -> None:
    down = Downlink(compressor=TopK(k=1), seed=0)
    got, bits, _ = down.send("x", _v(1, 2, 3, 4), _ids(0, 1), 3)
    assert got.tolist() == [1, 2, 3, 4] and bits.tolist() == [WHOLE, WHOLE]
    got, bits, _ = down.send("x", _v(1, 5, 3, 2), _ids(0, 1), 3)
    assert got.tolist() == [1, 5, 3, 4] and bits.tolist() == [PACKET, PACKET]  # the change of 3 goes first


def test_what_a_message_leaves_out_is_in_the_next_change() -> None:
    down = Downlink(compressor=TopK(k=1), seed=0)
    target = _v(1, 5, 3, 2)
    down.send("x", _v(1, 2, 3, 4), _ids(0), 1)
    down.send("x", target, _ids(0), 1)
    got, *_ = down.send("x", target, _ids(0), 1)
    assert got.tolist() == target.tolist()


def test_a_client_that_missed_messages_is_sent_those_or_the_whole_if_that_is_shorter() -> None:
    down = Downlink(compressor=TopK(k=1), seed=0)
    down.send("x", _v(0, 0, 0, 0), _ids(0, 1, 2), 4)
    for k in range(2):
        assert down.send("x", _v(k, k, 1, 1), _ids(0), 4)[1].tolist() == [PACKET]
    assert down.send("x", _v(9, 9, 9, 9), _ids(1), 4)[1].tolist() == [3 * PACKET]
    down.send("x", _v(8, 8, 8, 8), _ids(0), 4)
    bits = down.send("x", _v(7, 7, 7, 7), _ids(0, 1, 2, 3), 4)[1]
    assert bits.tolist() == [PACKET, 2 * PACKET, WHOLE, WHOLE]  # 2 missed five (170 bits), 3 never heard of x


def test_missed_messages_count_as_long_as_they_were() -> None:
    down, size = Downlink(compressor=Bernoulli(p=0.5), seed=0), 100
    down.send("x", torch.zeros(size), _ids(0, 1), 2)
    lengths = [int(down.send("x", torch.full((size,), float(k)), _ids(0), 2)[1]) for k in range(1, 9)]
    assert set(lengths) == {1, 32 * size}, "a flag, or a whole vector, which needs none"
    bits = down.send("x", torch.full((size,), 9.0), _ids(0, 1), 2)[1]
    assert bits.tolist()[1] == 32 * size, "one of those that it missed was whole, whatever the newest is"
    quiet = Downlink(compressor=Bernoulli(p=1e-9), seed=0)
    quiet.send("x", torch.zeros(size), _ids(0, 1), 2)
    for k in range(7):
        quiet.send("x", torch.full((size,), float(k)), _ids(0), 2)
    assert quiet.send("x", torch.zeros(size), _ids(0, 1), 2)[1].tolist() == [1, 8]


def test_every_broadcast_vector_has_a_copy_of_its_own() -> None:
    down = Downlink(compressor=TopK(k=1), seed=0)
    down.send("x", _v(1, 1, 1, 1), _ids(0), 1)
    assert down.send("c", _v(2, 2, 2, 2), _ids(0), 1)[1].tolist() == [WHOLE]
    assert down.copies["x"].value.tolist() == [1] * 4 and down.copies["c"].value.tolist() == [2] * 4


def test_messages_of_different_vectors_steps_and_seeds_draw_different_entries() -> None:
    def entries(seed: int, name: str) -> list[list[int]]:
        down, out = Downlink(compressor=RandK(k=8), seed=seed), []
        down.send(name, torch.zeros(64), _ids(0), 1)
        for _ in range(3):
            before = down.copies[name].value
            got, *_ = down.send(name, before + 1, _ids(0), 1)
            out.append(torch.nonzero(got - before).flatten().tolist())
        return out

    drawn = [*entries(0, "x"), *entries(0, "c"), *entries(1, "x")]
    assert len({tuple(d) for d in drawn}) == 9
    assert entries(0, "x") == drawn[:3]


def test_all_clients_of_a_round_train_from_the_running_copy() -> None:
    class See:
        def look(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
            return {"x": x.expand(len(clients), -1)}

    see = See()
    task = drawn(3, 4)
    fleet = build_fleet(task, see, downlink=Downlink(compressor=TopK(k=1), seed=0))
    fleet.ask(fleet.clients, see.look, x=_v(0, 0, 0, 0))
    r = fleet.ask(_ids(0, 2), see.look, x=_v(1, 5, 2, 3))
    assert r["x"].tolist() == [[0, 5, 0, 0]] * 2
    assert fleet.ledger.bits_down == 3 * WHOLE + 2 * PACKET


def test_the_download_is_as_long_as_its_bits() -> None:
    task = drawn(2, 4)
    devices = Constant(seconds_per_step=0.0, downlink=1.0)
    play = Play.start(
        task, FedAvg(local=local_sgd(task)), devices=devices, downlink=Downlink(compressor=TopK(k=1), seed=0)
    )
    play.path(2)
    assert play.fleet.now == WHOLE + PACKET


def test_compressed_broadcasts_reach_the_uncompressed_limit() -> None:
    task = drawn(4, 6)
    strategy = FedAvg(local=local_sgd(task, 0.2, steps=1))
    x = play(task, strategy, 300, downlink=Downlink(compressor=TopK(k=2), seed=0))[-1]
    torch.testing.assert_close(x, task.solution(), rtol=0, atol=1e-6)


# Up --------------------------------------------------------------------------------------------------------------


class Send:
    """Sends what it is told, one row a client."""

    def vector(self, clients: Cohort, v: Tensor) -> dict[str, Tensor]:
        return {"v": v * (1 + clients.ids[:, None])}

    def two(self, clients: Cohort, v: Tensor) -> dict[str, Tensor]:
        return {"a": v.expand(len(clients), -1), "b": v.expand(len(clients), -1)}


POWER = PowerSGD(rank=1, layout=Layout.of({"w": (4, 3)}))


@pytest.mark.parametrize("compressor", [TopK(k=1), POWER], ids=["top_k", "powersgd"])
def test_error_feedback_conserves_what_was_to_be_sent(compressor: Compressor) -> None:
    task, send = drawn(3, 12), Send()
    fleet = build_fleet(task, send, uplink=Uplink(compressor=compressor, error_feedback=True), width=2)
    sent, due = torch.zeros(3, 12).double(), torch.zeros(3, 12).double()
    generator = torch.Generator().manual_seed(0)
    for k in range(12):
        v = torch.randn(12, generator=generator, dtype=torch.float64)
        who = fleet.clients if k % 3 else _ids(0, 2)
        sent[who] += fleet.ask(who, send.vector, v=v)["v"]
        due[who] += v * (1 + who[:, None])
        error = fleet.memory.of(fleet.clients)["uplink/v"]
        torch.testing.assert_close(sent + error, due, rtol=0, atol=1e-12)
    assert float(error.abs().max()) > 0


def test_without_error_feedback_nothing_is_kept() -> None:
    task, send = drawn(3, 4), Send()
    fleet = build_fleet(task, send, uplink=Uplink(compressor=TopK(k=1)))
    r = fleet.ask(fleet.clients, send.vector, v=_v(1, -3, 2, 0))
    assert r["v"].tolist() == [[0, -3.0 * k, 0, 0] for k in (1, 2, 3)]
    assert not fleet.memory.tables and fleet.ledger.bits_up == 3 * PACKET


@pytest.mark.parametrize("compressor", [RandK(k=2), QSGD(levels=1)])
@pytest.mark.parametrize("link", ["uplink", "downlink"])
def test_compressors_that_expand_are_scaled_where_they_have_to_contract(compressor: Any, link: str) -> None:
    task = drawn(4, 10)
    assert compressor.omega(10) > 1
    up = {"uplink": Uplink(compressor=compressor, error_feedback=True)}
    links: Any = up if link == "uplink" else {"downlink": Downlink(compressor=compressor, seed=0)}
    x = play(task, FedAvg(local=local_sgd(task, 0.04, steps=1)), 250, **links)[-50:].mean(0)
    assert float((x - task.solution()).norm()) < 0.1  # 1e20 and more as they stand


def test_an_error_is_kept_only_when_the_reply_is_received() -> None:
    task, send = drawn(2, 4), Send()
    fleet = build_fleet(
        task, send, uplink=Uplink(compressor=TopK(k=1), error_feedback=True), devices=Clocks((1.0, 9.0))
    )
    fleet.send(fleet.clients, send.vector, v=_v(1, -3, 2, 0))
    fleet.receive(until=2.0)
    assert fleet.memory.of(fleet.clients)["uplink/v"].tolist() == [[1, 0, 2, 0], [0, 0, 0, 0]]


def test_what_a_packet_leaves_for_the_next_is_kept_only_when_the_reply_is_received() -> None:
    task, send = drawn(2, 12), Send()
    fleet = build_fleet(task, send, uplink=Uplink(compressor=POWER), devices=Clocks((1.0, 9.0)))
    v = torch.outer(torch.arange(1.0, 5.0), torch.tensor([0.0, 3.0, 4.0])).flatten().double()
    fleet.send(fleet.clients, send.vector, v=v)
    fleet.receive(until=2.0)
    first, second = fleet.memory.of(fleet.clients)["uplink/v/w.right"]
    size = 5 * 30**0.5  # of the only singular value: M^T P is it times the row's direction, of either sign
    assert first.abs().tolist() == pytest.approx([0.0, 0.6 * size, 0.8 * size]) and not second.any()
    assert list(fleet.memory.tables) == ["uplink/v/w.right"]


def test_the_server_remembers_its_last_packet_too() -> None:
    target = torch.outer(torch.arange(4.0), torch.tensor([2.0, 0.0, 1.0])).flatten().double()
    target += torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)

    def left(warm: bool) -> float:
        down = Downlink(compressor=PowerSGD(rank=1, warm_start=warm, layout=POWER.layout), seed=0)
        down.send("x", torch.zeros(12, dtype=torch.float64), _ids(0), 1)
        for k in range(1, 9):  # every change is the same but for what earlier ones left out
            got, *_ = down.send("x", k * target, _ids(0), 1)
        return float((got - 8 * target).norm())

    assert left(True) < 0.9 * left(False)


def test_two_vectors_of_one_reply_draw_different_entries() -> None:
    task, send = drawn(1, 64), Send()
    fleet = build_fleet(task, send, uplink=Uplink(compressor=RandK(k=8)))
    r = fleet.ask(fleet.clients, send.two, cost=Cost(vectors_up=2), v=torch.ones(64, dtype=torch.float64))
    assert not torch.equal(r["a"] != 0, r["b"] != 0)
    assert int((r["a"] != 0).sum()) == int((r["b"] != 0).sum()) == 8


def test_the_compressors_numbers_are_those_of_client_and_job() -> None:
    task, send = drawn(3, 8), Send()
    fleet = build_fleet(task, send, uplink=Uplink(compressor=RandK(k=2)), width=2)
    fleet.ask(fleet.clients, send.vector, v=torch.ones(8, dtype=torch.float64))
    r = fleet.ask(fleet.clients, send.vector, v=torch.ones(8, dtype=torch.float64))
    step = sum((i + 1) * ord(c) for i, c in enumerate("v"))
    rows = torch.ones(3, 8, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [3.0]])
    packet = RandK(k=2).encode(rows, Streams(0, torch.arange(3), torch.ones(3, dtype=torch.int64)), step)
    torch.testing.assert_close(r["v"], packet.decode(), rtol=0, atol=0)


@pytest.mark.parametrize("compressor", [RandK(k=2), QSGD(levels=4), TopK(k=2)])
def test_compression_leaves_cohorts_and_minibatches_as_they_are(compressor: Any) -> None:
    keys = []
    for uplink in (None, Uplink(compressor=compressor, error_feedback=True)):
        task = drawn(4, 6, noise=0.5)
        keys.append(watched(task))
        play(task, FedAvg(cohort_size=2, local=local_sgd(task, 0.1, steps=3)), 5, uplink=uplink)
    assert keys[0] == keys[1] and len(keys[0]) == 5 * 2 * 3


def test_control_variates_travel_whole_so_that_c_stays_their_mean() -> None:
    task = drawn(5, 4, noise=0.3)
    strategy = Scaffold(cohort_size=3, local=local_sgd(task, 0.05, steps=3))
    play = Play.start(task, strategy, uplink=Uplink(compressor=TopK(k=1), error_feedback=True))
    for _ in range(6):
        play.step()
        torch.testing.assert_close(
            play.state.c, play.fleet.memory.of(play.fleet.clients)["c"].mean(0), rtol=0, atol=1e-13
        )
    assert play.fleet.ledger.bits_up == 6 * 3 * (PACKET + WHOLE)
