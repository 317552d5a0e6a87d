from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedsim.compress.error_feedback import contractive
from fedsim.compress.packet import Compressor
from fedsim.compress.sparsify import Bernoulli, RandK, TopK
from fedsim.flower import wire
from fedsim.flower.downlink import Copies, Numbered, receive_copies
from fedsim.sim.account import bits_of
from fedsim.sim.links import Downlink
from tests.fedsim.flower.local_grid import through_bytes

N, P = 3, 20


class Wired:
    """A server that sends a moving vector to some of its clients, beside the simulator's downlink."""

    def __init__(self, compressor: Compressor) -> None:
        self.copies, self.simulated = (
            Copies(Downlink(compressor=compressor, seed=4)),
            Downlink(compressor=compressor, seed=4),
        )
        self.book = wire.Book({"downlink": compressor, "scaled": contractive(compressor, P)})
        self.clients: list[dict[str, Numbered]] = [{} for _ in range(N)]
        self.lost: set[int] = set()  # clients that do not keep what they get
        self.step = 0

    def send(self, *ids: int) -> tuple[list[int], list[int]]:
        """(bits on the wire, bits that the simulator counts), one a recipient."""
        self.step += 1
        v = torch.sin(torch.arange(float(P)) + self.step)
        to = torch.tensor(ids)
        value, each, keys = self.copies.send("x", v, to, N)
        expected, counted, _ = self.simulated.send("x", v, to, N)
        assert torch.equal(value, expected)
        sent = []
        for i, values in zip(ids, each, strict=True):
            content = through_bytes(wire.write(values, self.book, keys))
            for _ in range(2):  # a message that comes twice, the second time to a client that has kept it
                new, broadcast = receive_copies(wire.read(content, self.book), self.clients[i])
                assert torch.equal(broadcast["x"], expected)
                self.clients[i] |= {} if i in self.lost else new
            sent.append(sum(map(bits_of, values.values())))
        return sent, counted.tolist()


def test_clients_reconstruct_the_simulators_copy_whatever_they_missed() -> None:
    wired = Wired(RandK(k=3))
    packet = 3 * (32 + 5)
    assert wired.send(0, 1, 2) == ([640] * 3, [640] * 3)
    assert wired.send(0) == ([packet], [packet])
    assert wired.send(0, 1) == ([packet, 2 * packet], [packet, 2 * packet])
    assert wired.send(2) == ([3 * packet], [3 * packet])


def test_a_client_that_missed_more_than_a_vector_gets_the_vector() -> None:
    wired = Wired(TopK(k=6))
    wired.send(0, 1)
    for _ in range(3):
        wired.send(0)
    assert wired.send(1) == ([640], [640])
    assert wired.send(2) == ([640], [640])


def test_packets_of_changing_length_are_counted_as_they_are() -> None:
    wired = Wired(Bernoulli(p=0.5))
    wired.send(0)
    lengths = {wired.send(0)[0][0] for _ in range(12)}
    assert lengths == {1, 640}  # a whole vector is no longer than the flag and the vector


def test_indices_that_follow_from_the_seed_need_no_bits() -> None:
    wired = Wired(RandK(k=3, shared_seed=True))
    wired.send(0, 1)
    wired.send(0)
    assert wired.send(0, 1)[0] == [96, 192]


def test_after_forgetting_everybody_gets_whole_vectors() -> None:
    wired = Wired(TopK(k=2))
    wired.send(0, 1)
    wired.copies.forget()
    wired.simulated.copies["x"] = replace(wired.simulated.copies["x"], seen=torch.zeros(N, dtype=torch.int64))
    wired.clients = [{} for _ in range(N)]
    assert wired.send(0)[0] == [640]


def test_more_than_ten_changes_are_applied_in_their_order() -> None:
    wired = Wired(TopK(k=1))
    wired.send(0, 1)
    for _ in range(11):
        wired.send(0)
    assert wired.send(1)[0] == [12 * 37]


def test_a_client_that_missed_a_message_unnoticed_says_so_and_computes_nothing() -> None:
    wired = Wired(TopK(k=1))
    wired.send(0, 1)
    wired.lost = {1}
    wired.send(0, 1)
    with pytest.raises(ValueError, match="change 3 of 'x' arrived, and no copy after change 2 is here"):
        wired.send(0, 1)
