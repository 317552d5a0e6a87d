"""What every compressor of the table must keep: its bits, its bytes, its constants."""

import pickle
from dataclasses import replace

import pytest
import torch

from fedsim.compress import COMPRESSORS
from fedsim.compress.combined import Composed
from fedsim.compress.packet import Compressor, Packet
from fedsim.compress.quantize import QSGD, BFloat16, Natural, ScaledSign
from fedsim.compress.sparsify import RandK, TopK
from fedsim.params import Layout
from fedsim.streams import Streams
from tests.build import streams

P = 33
LAYOUT = Layout.of({"w": (7, 4), "b": (5,)})
SETTINGS: dict[str, list[dict[str, object]]] = {
    "identity": [{}],
    "rand_k": [{"k": 3}, {"k": 20}, {"fraction": 0.2, "shared_seed": True}, {"k": 3, "common": True}],
    "top_k": [{"k": 3}, {"fraction": 0.5}],
    "bernoulli": [{"p": 0.3}],
    "qsgd": [{"levels": 1}, {"levels": 4}, {"levels": 300}],
    "adaptive_qsgd": [{"levels": 1}, {"levels": 5}],
    "terngrad": [{}],
    "natural": [{}],
    "bf16": [{}],
    "fp16": [{}],
    "natural_dithering": [{"levels": 1}, {"levels": 5}, {"levels": 3, "norm": "linf"}, {"levels": 3, "norm": "l1"}],
    "scaled_sign": [{}],
    "powersgd": [{"rank": 2, "layout": LAYOUT}, {"rank": 2, "layout": LAYOUT, "warm_start": False}],
    "seeds": [{"steps": 3}, {"steps": 2, "directions": 2, "layout": replace(LAYOUT, num_buffers=1)}],
    "composed": [
        {"first": TopK(k=9), "then": QSGD(levels=4)},
        {"first": TopK(fraction=0.5), "then": QSGD(levels=1)},  # omega = 4, which error feedback would not bear
        {"first": RandK(k=20, common=True), "then": BFloat16()},
        {"first": TopK(k=3), "then": ScaledSign()},
    ],
    "per_tensor": [
        {"of": TopK(k=3), "layout": LAYOUT},
        {"of": RandK(fraction=0.5, shared_seed=True), "layout": LAYOUT},
        {"of": Composed(first=TopK(fraction=0.4), then=Natural()), "layout": LAYOUT},
    ],
}
CASES = [
    pytest.param(COMPRESSORS[name](**fields), id="-".join([name, *(f"{k}={v}" for k, v in fields.items())][:3]))
    for name in COMPRESSORS
    for fields in SETTINGS[name]
]
every = pytest.mark.parametrize("compressor", CASES)


def stack(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, P, generator=torch.Generator().manual_seed(rows), dtype=dtype)


def jobs(count: int) -> Streams:
    """Streams of so many jobs of one client."""
    return Streams(5, torch.zeros(count, dtype=torch.int64), torch.arange(count))


@every
def test_every_row_reads_back_bit_for_bit_and_is_as_long_as_counted(compressor: Compressor) -> None:
    packet = compressor.encode(stack(6), streams(6), step=2)
    decoded = packet.decode()
    assert decoded.shape == (6, P) and decoded.dtype == torch.float32
    for i in range(6):
        data = packet.encode_row(i)
        known = compressor.shared(streams(6).rows([i]), P, step=2)
        assert len(data) == -(-int(packet.bits[i]) // 8)
        assert torch.equal(Packet.decode_row(data, compressor, P, known).decode()[0], decoded[i])


@every
def test_bits_are_known_before_the_work(compressor: Compressor) -> None:
    bits = compressor.encode(stack(4000), streams(4000)).bits
    assert bits.dtype == torch.int64
    if int(bits.min()) == int(bits.max()):
        assert int(bits[0]) == compressor.bits(P)
    else:  # random: within four standard errors of the stated mean
        assert float(bits.double().mean()) == pytest.approx(
            compressor.bits(P), abs=4 * float(bits.double().std()) / 4000**0.5
        )


@every
def test_zero_comes_back_as_zero(compressor: Compressor) -> None:
    assert not compressor.encode(torch.zeros(3, P), streams(3)).decode().any()


@every
def test_a_row_does_not_depend_on_its_stack(compressor: Compressor) -> None:
    v = stack(5)
    whole = compressor.encode(v, streams(5), step=3)
    alone = compressor.encode(v[3:4], streams(5).rows([3]), step=3)
    assert torch.allclose(alone.decode()[0], whole.decode()[3], atol=1e-6)


@every
def test_the_input_is_left_alone_and_may_have_any_stride(compressor: Compressor) -> None:
    v = stack(5)
    before = v.clone()
    whole = compressor.encode(v, streams(5)).decode()
    assert torch.equal(v, before)
    transposed = v.T.contiguous().T
    assert torch.allclose(compressor.encode(transposed, streams(5)).decode(), whole, atol=1e-6)


@every
def test_packets_pickle(compressor: Compressor) -> None:
    packet = compressor.encode(stack(3), streams(3))
    assert torch.equal(pickle.loads(pickle.dumps(packet)).decode(), packet.decode())


@every
def test_an_unbiased_one_is_right_on_average(compressor: Compressor) -> None:
    if not compressor.unbiased:
        assert compressor.omega(P) is None
        return
    rows = 20_000
    v = stack(1, torch.float64)[0]
    sent = compressor.encode(v.expand(rows, -1), jobs(rows)).decode()
    standard_error = sent.std(dim=0) / rows**0.5
    assert bool(((sent.mean(dim=0) - v).abs() <= 4 * standard_error + 1e-6).all())


@every
def test_the_mean_error_stays_within_the_stated_constants(compressor: Compressor) -> None:
    rows = 4000
    for v in (stack(1, torch.float64)[0], torch.eye(P, dtype=torch.float64)[2], torch.ones(P, dtype=torch.float64)):
        sent = compressor.encode(v.expand(rows, -1), jobs(rows)).decode()
        errors = (sent - v).square().sum(dim=1) / v.square().sum()
        bound = float(errors.mean()) - 4 * float(errors.std()) / rows**0.5 - 1e-9
        omega, delta = compressor.omega(P), compressor.delta(P)
        assert omega is None or bound <= omega
        assert delta is None or bound <= 1.0 - 1.0 / delta


@every
def test_float64_stays_float64_or_is_exactly_representable(compressor: Compressor) -> None:
    packet = compressor.encode(stack(2, torch.float64), streams(2))
    assert packet.decode().dtype == torch.float64 or not any(
        value.is_floating_point() for value in packet.payload.values()
    )


@every
@pytest.mark.parametrize(
    "scale", [1e-42, 1e-30, 1e30], ids=["denormal numbers", "squares below float32", "squares above float32"]
)
def test_extreme_vectors_keep_their_size(compressor: Compressor, scale: float) -> None:
    v = stack(1)[0]
    extreme = [v * scale, torch.eye(P)[2] * scale, v * torch.logspace(-12, 0, P) * scale]
    for rows in (row.expand(64, -1) for row in extreme):
        packet = compressor.encode(rows, jobs(64))
        assert packet.decode().isfinite().all()
        known = compressor.shared(jobs(64).rows([0]), P)
        read = Packet.decode_row(packet.encode_row(0), compressor, P, known)
        assert torch.equal(read.decode()[0], packet.decode()[0])
        if scale < 1e-37:  # float32 itself has no relative precision there
            continue
        errors = (packet.decode().double() - rows).square().sum(dim=1) / rows.double().square().sum(dim=1)
        bound = float(errors.mean()) - 5 * float(errors.std()) / 8.0 - 1e-6
        omega, delta = compressor.omega(P), compressor.delta(P)
        assert omega is None or bound <= omega
        assert delta is None or bound <= 1.0 - 1.0 / delta
