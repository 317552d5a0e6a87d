import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.compress.packet import Packet
from fedsim.compress.quantize import QSGD, Natural
from fedsim.compress.sparsify import Bernoulli, Identity, RandK, TopK
from tests.build import streams


def test_top_2_of_5_is_written_as_two_floats_and_two_3_bit_indices() -> None:
    packet = TopK(k=2).encode(torch.tensor([[0.0, -3.0, 1.0, 0.5, 2.0]]), streams(1))
    data = packet.encode_row(0)
    assert packet.bits.tolist() == [2 * 32 + 2 * 3]
    assert data[:8] == np.array([-3.0, 2.0], dtype="<f4").tobytes()
    assert list(data[8:]) == [1 | 4 << 3]  # the indices 1 and 4, lowest bits first


def test_natural_codes_of_nine_bits_follow_each_other_without_gaps() -> None:
    packet = Natural().encode(torch.tensor([[1.0, -2.0, 0.0]]), streams(1))
    number = int.from_bytes(packet.encode_row(0), "little")
    assert [number >> 9 * i & 0x1FF for i in range(3)] == [127, 256 + 128, 0]
    assert len(packet.encode_row(0)) == 4  # 27 bits


def test_rows_that_bernoulli_does_not_send_cost_one_bit() -> None:
    packet = Bernoulli(p=0.5).encode(torch.ones(64, 10), streams(64))
    sent = packet.payload["sent"][:, 0] > 0
    assert 0 < int(sent.sum()) < 64
    assert packet.bits.tolist() == [321 if s else 1 for s in sent]
    assert [len(packet.encode_row(i)) for i in range(64)] == [41 if s else 1 for s in sent]


def test_a_shared_seed_saves_the_indices_and_the_receiver_draws_them_itself() -> None:
    v, own = torch.randn(3, 100), streams(3)
    packet = RandK(k=5, shared_seed=True).encode(v, own, step=2)
    assert packet.bits.tolist() == [160] * 3
    again = Packet.decode_row(
        packet.encode_row(1), packet.compressor, 100, packet.compressor.shared(own.rows([1]), 100, step=2)
    )
    assert torch.equal(again.decode(), packet.decode()[1:2])
    with pytest.raises(ValueError, match="shared by seed"):
        Packet.decode_row(packet.encode_row(1), packet.compressor, 100)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"\0"])
def test_data_of_a_wrong_length_are_refused(change) -> None:  # type: ignore[no-untyped-def]
    data = QSGD(levels=4).encode(torch.ones(1, 9), streams(1)).encode_row(0)
    with pytest.raises(ValueError, match="cut short|needs"):
        Packet.decode_row(change(data), QSGD(levels=4), 9)


def test_float64_numbers_stay_exact_in_memory_and_are_counted_as_float32() -> None:
    v = torch.randn(2, 6, dtype=torch.float64)
    packet = Identity().encode(v, streams(2))
    assert torch.equal(packet.decode(), v)
    assert packet.bits.tolist() == [192, 192]
    assert torch.equal(Packet.decode_row(packet.encode_row(0), Identity(), 6).decode()[0], v[0].float())


def test_other_types_and_shapes_are_refused() -> None:
    for bad in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"stack \[C, P\]"):
            TopK(k=1).encode(bad, streams(2))


@settings(max_examples=40, deadline=None)
@given(entries=st.integers(1, 70), levels=st.integers(1, 400), seed=st.integers(0, 2**16))
def test_any_code_width_and_length_reads_back_bit_for_bit(entries: int, levels: int, seed: int) -> None:
    v = torch.randn(2, entries, generator=torch.Generator().manual_seed(seed))
    packet = QSGD(levels=levels).encode(v, streams(2))
    for i in range(2):
        data = packet.encode_row(i)
        again = Packet.decode_row(data, packet.compressor, entries)
        assert len(data) == -(-int(packet.bits[i]) // 8)
        assert all(torch.equal(again.payload[k][0], packet.payload[k][i]) for k in packet.payload)
