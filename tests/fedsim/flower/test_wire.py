from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedsim.compress import COMPRESSORS
from fedsim.compress.combined import Composed
from fedsim.compress.error_feedback import Contractive
from fedsim.compress.packet import Compressor, Packet
from fedsim.compress.quantize import QSGD
from fedsim.compress.sparsify import RandK, TopK
from fedsim.flower import wire
from fedsim.params import Layout
from fedsim.sim.account import bits_of
from fedsim.streams import Streams
from tests.fedsim.flower.local_grid import through_bytes

P = 40
LAYOUT = Layout.of({"weight": (5, 8)})
NOBODY = wire.Book({})
SETTINGS: dict[str, dict[str, Any]] = {
    "rand_k": {"k": 7},
    "top_k": {"k": 7},
    "bernoulli": {"p": 0.5},
    "qsgd": {"levels": 4},
    "adaptive_qsgd": {"levels": 4},
    "natural_dithering": {"levels": 4},
    "powersgd": {"rank": 2},
    "seeds": {"steps": 5},
    "composed": {"first": RandK(k=7), "then": QSGD(levels=4)},
    "per_tensor": {"of": Composed(first=TopK(fraction=0.2), then=QSGD(levels=4))},
}


def trip(values: dict[str, Any], book: wire.Book = NOBODY, keys: tuple[wire.Key, ...] = ()) -> dict[str, Any]:
    """Values after a trip as Flower's bytes."""
    content = through_bytes(wire.write(values, book, keys))
    return wire.read(content, book)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_a_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = (torch.arange(6.0).reshape(2, 3) * 0.37).to(dtype).flatten()[: torch.Size(shape).numel()].reshape(shape)
    got = trip({"x": sent})["x"]
    assert got.dtype == dtype and got.shape == shape and torch.equal(got, sent)


def test_infinities_and_the_bits_of_nan_survive() -> None:
    sent = torch.tensor([0x7FC00123, 0x7F800000, -0x80000000], dtype=torch.int32).view(torch.float32)
    assert torch.equal(trip({"x": sent})["x"].view(torch.int32), sent.view(torch.int32))


def test_a_strided_view_travels_as_what_it_shows() -> None:
    sent = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(trip({"x": sent})["x"], sent)


def test_a_tensors_payload_is_its_bytes_and_no_header() -> None:
    assert len(wire.raw_array(torch.zeros(250)).data) == 1000


def test_numbers_text_and_nothing_keep_their_kind() -> None:
    sent = {"k": 3, "lr": 0.1, "b": True, "why": "so", "none": None, "third": 1 / 3}
    got = trip(sent)
    assert got == sent
    assert [type(got[k]) for k in sent] == [type(v) for v in sent.values()]


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(ValueError, match="mask is a list; only tensors, packets, numbers, text and None can travel"):
        wire.write({"mask": [1, 2]}, NOBODY)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_packet_travels_as_its_own_bytes_and_decodes_to_the_same_numbers(name: str) -> None:
    compressor = COMPRESSORS[name](**SETTINGS.get(name, {})).bind(LAYOUT)
    streams = Streams(5, torch.tensor([3]), torch.tensor([2]))
    packet = compressor.encode(streams.normal("v", P), streams)
    book, keys = wire.Book({"uplink": compressor}), ((5, 3, 2, 0),)
    array = wire.packet_array(packet, book, keys)
    assert len(array.data) == -(-int(packet.bits[0]) // 8)
    got = trip({"d": packet}, book, keys)["d"]
    assert isinstance(got, Packet)
    assert torch.equal(got.decode(), packet.decode())
    assert int(got.bits[0]) == int(packet.bits[0]) == bits_of(got)


@pytest.mark.parametrize("compressor", [RandK(k=4, shared_seed=True), RandK(k=4, common=True)])
def test_fields_that_follow_from_the_seed_are_drawn_again_by_the_receiver(compressor: Compressor) -> None:
    packet = compressor.encode(torch.arange(float(P))[None], Streams(5, torch.tensor([3]), torch.tensor([2])), step=9)
    book = wire.Book({"uplink": compressor})
    assert len(wire.packet_array(packet, book, [(5, 3, 2, 9)]).data) == 4 * 4
    got = trip({"d": packet}, book, ((5, 3, 2, 0), (5, 3, 2, 9)))["d"]
    assert torch.equal(got.decode(), packet.decode())


def test_a_packet_whose_key_the_receiver_cannot_know_is_refused() -> None:
    compressor = RandK(k=4, shared_seed=True)
    packet = compressor.encode(torch.arange(float(P))[None], Streams(5, torch.tensor([3]), torch.tensor([2])))
    with pytest.raises(ValueError, match="set shared_seed: false"):
        wire.write({"d": packet}, wire.Book({"uplink": compressor}), [(5, 3, 1, 0)])


def test_a_compressor_that_the_other_end_lacks_is_refused_at_both_ends() -> None:
    streams = Streams(0, torch.tensor([0]), torch.tensor([0]))
    packet = TopK(k=2).encode(torch.arange(float(P))[None], streams)
    with pytest.raises(ValueError, match="the other end does not know"):
        wire.write({"d": packet}, wire.Book({"uplink": TopK(k=3)}))
    content = wire.write({"d": packet}, wire.Book({"uplink": TopK(k=2)}))
    with pytest.raises(ValueError, match="both ends need the same experiment file"):
        wire.read(content, NOBODY)


def test_the_book_knows_a_strategys_compressors_as_they_are_and_scaled() -> None:
    @dataclass(frozen=True)
    class Compressing:
        lr: float
        compressor: RandK

    rule = RandK(k=2)
    book = wire.Book.of(Compressing(0.1, rule), {"uplink": None, "downlink": TopK(k=1)})
    assert book.name(rule) == "strategy.compressor"
    assert book.name(Contractive(of=rule)) == "strategy.compressor/contractive"
    assert book.name(TopK(k=1)) == "downlink"


def test_bytes_cut_short_are_noticed() -> None:
    array = wire.raw_array(torch.zeros(3))
    array.data = array.data[:-1]
    with pytest.raises(ValueError, match=r"float32\[3\] takes 12 bytes and 11 arrived"):
        wire.of_array(array, NOBODY)


def test_bits_count_numbers_entries_and_yes_or_no() -> None:
    assert [bits_of(v) for v in (None, True, 7, 0.5, torch.zeros(2, 5))] == [0, 1, 32, 32, 320]


def test_a_message_of_another_app_is_refused() -> None:
    with pytest.raises(ValueError, match="its sender is not fedsim"):
        wire.Head.read(wire.write({}, NOBODY))
