"""Packets from anybody: decoding takes what an encoder can write, and refuses everything else with a ValueError."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.compress import COMPRESSORS
from fedsim.compress.error_feedback import Contractive
from fedsim.compress.packet import Packet
from tests.build import streams
from tests.contracts.test_compressors import SETTINGS
from tests.fuzz.amount import cases
from tests.fuzz.packets import P, could_be_written

EVERY = [(name, fields) for name, each in SETTINGS.items() for fields in each]
PER_SETTING = cases(60, 700)  # of some 30 settings


def damaged(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Bytes near a packet: bits turned, bytes set, cut, added or taken from another packet, or none of it kept."""
    out = bytearray(data)
    kind = int(rng.integers(7))
    at = int(rng.integers(len(out)))
    if kind == 0:
        out[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        out[at : at + 4] = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\xff", b"\xff" * 4])
    elif kind == 2:
        out = out[:at]
    elif kind == 3:
        out += rng.bytes(int(rng.integers(1, 9)))
    elif kind == 4:
        out[at:] = other[at:]
    elif kind == 5:
        out = bytearray(rng.bytes(len(out)))
    elif kind == 6:
        out[-4:] = out[-8:-4]
    return bytes(out)


@pytest.mark.parametrize(("name", "fields"), EVERY, ids=[f"{name}-{i}" for i, (name, _) in enumerate(EVERY)])
def test_a_packet_is_read_if_and_only_if_an_encoder_can_have_written_it(name: str, fields: dict[str, object]) -> None:
    compressor, rng = COMPRESSORS[name](**fields), np.random.default_rng(len(str(fields)))
    whole = compressor.encode(torch.from_numpy(rng.standard_normal((8, P), dtype=np.float32)), streams(8))
    rows = [whole.encode_row(i) for i in range(8)]
    known = compressor.shared(streams(8).rows([0]), P)
    assert all(could_be_written(name, fields, row) for row in rows)
    taken = 0
    for case in range(PER_SETTING):
        data = damaged(rows[case % 8], rows[(case + 3) % 8], rng)
        try:
            packet = Packet.decode_row(data, compressor, P, known)
        except ValueError as e:
            assert str(e) and not could_be_written(name, fields, data), f"{data.hex()} is refused: {e}"
            continue
        taken += 1
        assert could_be_written(name, fields, data), f"{data.hex()} is taken"
        assert packet.encode_row(0) == data and bool(packet.decode().isfinite().all())
    assert 0 < taken < PER_SETTING


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vector_that_is_not_finite_travels_in_no_packet(value: float) -> None:
    v = torch.linspace(-1.0, 1.0, P)[None].clone()
    v[0, 4] = value
    for name, fields in EVERY:
        if name == "bernoulli":
            fields = {"p": 1.0}  # or it might not be sent
        compressor = COMPRESSORS[name](**fields)
        data, known = compressor.encode(v, streams(1)).encode_row(0), compressor.shared(streams(1), P)
        try:
            packet = Packet.decode_row(data, compressor, P, known)
        except ValueError as e:
            assert "encoder writes" in str(e)
        else:
            assert bool(packet.decode().isfinite().all()) and "RandK" in str(compressor), (
                "the entry is not among those chosen"
            )


def test_a_scaled_compressor_reads_as_strictly_as_the_one_it_scales() -> None:
    scaled = Contractive(of=COMPRESSORS["rand_k"](k=3))
    data = scaled.encode(torch.ones(1, P), streams(1)).encode_row(0)
    assert Packet.decode_row(data, scaled, P).encode_row(0) == data
    with pytest.raises(ValueError, match="ascending order without repetition"):
        Packet.decode_row(data[:12] + b"\0\0\0", scaled, P)
