from math import sqrt

import pytest
import torch

from fedsim.compress.adaptive import AdaptiveQSGD
from fedsim.compress.packet import Compressor
from fedsim.compress.quantize import QSGD, BFloat16, Float16, Natural, NaturalDithering, ScaledSign, TernGrad
from fedsim.compress.words import blocks
from tests.build import streams


def repeated(values: list[float], rows: int) -> torch.Tensor:
    return torch.tensor(values).expand(rows, -1)


def test_bits_and_constants_of_the_table() -> None:
    assert QSGD(levels=4).bits(10) == 32 + 10 * (1 + 3)
    assert QSGD(levels=3).bits(10) == 32 + 10 * (1 + 2)
    assert QSGD(levels=2).omega(16) == 2.0  # sqrt(16) / 2 < 16 / 4
    assert QSGD(levels=8).omega(16) == 0.25  # 16 / 64 < sqrt(16) / 8
    assert TernGrad().bits(10) == 32 + 20
    assert Natural().bits(10) == 90 and Natural().omega(10) == 0.125
    assert NaturalDithering(levels=3).bits(10) == 32 + 30
    assert NaturalDithering(levels=3).omega(4) == 0.125 + 0.25  # t = 2 / 4
    assert NaturalDithering(levels=3, norm="linf").omega(4) == 0.125 + 0.25
    assert NaturalDithering(levels=1, norm="l1").omega(4) == 0.125 + 4.0  # t = 4
    assert ScaledSign().bits(10) == 42 and ScaledSign().delta(10) == 10.0


def test_qsgd_sends_neighbouring_multiples_of_the_norm() -> None:
    sent = QSGD(levels=2).encode(repeated([3.0, -4.0], 400), streams(400)).decode()  # norm 5: steps of 2.5
    assert sent[:, 0].unique().tolist() == [2.5, 5.0]
    assert sent[:, 1].unique().tolist() == [-5.0, -2.5]


def test_terngrad_has_exactly_the_stated_variance() -> None:
    v = torch.tensor([1.0, -0.5, 0.25, 0.0])
    exact = float(v.abs().max() * v.abs().sum() / v.square().sum()) - 1.0  # 1/3
    sent = TernGrad().encode(v.expand(40_000, -1), streams(40_000)).decode()
    errors = (sent - v).square().sum(dim=1) / v.square().sum()
    assert float(errors.mean()) == pytest.approx(exact, abs=4 * float(errors.std()) / 200)


def test_the_constant_of_terngrad_is_attained() -> None:
    for entries in (1, 4, 9):
        worst = torch.full((entries,), 1.0 / (1.0 + sqrt(entries)))
        worst[0] = 1.0
        exact = float(worst.max() * worst.sum() / worst.square().sum()) - 1.0
        assert TernGrad().omega(entries) == pytest.approx(exact, abs=1e-6)


def test_natural_keeps_powers_of_two_and_rounds_others_to_the_two_beside_them() -> None:
    v = repeated([8.0, -0.25, 0.0, 5.0], 500)
    sent = Natural().encode(v, streams(500)).decode()
    assert torch.equal(sent[:, :3], v[:, :3])
    assert sent[:, 3].unique().tolist() == [4.0, 8.0]
    assert float((sent[:, 3] == 8.0).float().mean()) == pytest.approx(0.25, abs=4 * sqrt(0.1875 / 500))


def test_natural_at_the_ends_of_the_range_of_float32() -> None:
    tiny, large = 2.0**-127, 3e38  # half the least normal number; above 2^127
    sent = Natural().encode(repeated([tiny, large, torch.inf, -torch.inf, torch.nan], 500), streams(500)).decode()
    assert sent[:, 0].unique().tolist() == [0.0, 2.0**-126]
    assert sent[:, 1].unique().tolist() == [2.0**127]
    assert bool((sent[:, 2] == torch.inf).all() and (sent[:, 3] == -torch.inf).all())
    assert not bool(sent[:, 4].isfinite().any())


def test_natural_dithering_sends_powers_of_two_of_the_norm_or_zero() -> None:
    sent = NaturalDithering(levels=3, norm="linf").encode(repeated([4.0, -3.0, 0.5, 0.0], 500), streams(500)).decode()
    assert [sent[:, i].unique().tolist() for i in range(4)] == [[4.0], [-4.0, -2.0], [0.0, 1.0], [0.0]]


def test_scaled_sign_sends_the_mean_magnitude_and_counts_zero_as_plus() -> None:
    sent = ScaledSign().encode(torch.tensor([[1.0, -2.0, 0.0]]), streams(1)).decode()
    assert sent.tolist() == [[1.0, -1.0, 1.0]]


def test_scaled_sign_has_exactly_the_stated_contraction() -> None:
    v = torch.randn(20, 30, dtype=torch.float64)
    error = (ScaledSign().encode(v, streams(20)).decode() - v).square().sum(dim=1)
    l1, l2 = v.abs().sum(dim=1), v.square().sum(dim=1)
    assert torch.allclose(error / l2, 1.0 - l1**2 / (30 * l2))


@pytest.mark.parametrize("compressor", [QSGD(levels=5), TernGrad(), NaturalDithering(levels=4), Natural(), BFloat16()])
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
def test_very_small_and_very_large_vectors_keep_their_size(compressor, scale: float) -> None:  # type: ignore[no-untyped-def]
    v = repeated([3.0 * scale, -4.0 * scale], 2000)
    mean = compressor.encode(v, streams(2000)).decode().double().mean(dim=0) / scale
    assert mean.tolist() == pytest.approx([3.0, -4.0], abs=0.3)


@pytest.mark.parametrize(
    "compressor",
    [QSGD(levels=5), AdaptiveQSGD(levels=5), TernGrad(), NaturalDithering(levels=4), ScaledSign(), Float16()],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_diverged_does_not_come_back_finite(compressor, bad: float) -> None:  # type: ignore[no-untyped-def]
    sent = compressor.encode(torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 3.0]]), streams(2)).decode()
    assert not bool(sent[0].isfinite().any()) and bool(sent[1].isfinite().all())


def test_random_words_do_not_depend_on_the_width_of_the_blocks() -> None:
    keys = torch.arange(3)
    wide = torch.cat([w for _, w in blocks(torch.zeros(1, 100_001), keys[1:2])], dim=1)
    many = torch.cat([w for _, w in blocks(torch.zeros(3, 100_001), keys)], dim=1)
    assert torch.equal(many[1:2], wide) and many.shape == (3, 100_001)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QSGD(levels=0), "qsgd.levels"),
        (lambda: NaturalDithering(levels=0), "natural_dithering.levels"),
        (lambda: NaturalDithering(levels=2, norm="l3"), "norm must be one of"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("rule", "dtype"), [(BFloat16(), torch.bfloat16), (Float16(), torch.float16)])
def test_16_bit_numbers_are_those_of_torch_and_next_to_what_was_given(rule: Compressor, dtype: torch.dtype) -> None:
    v = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 500)
    v /= v.abs().amax(dim=1, keepdim=True) / 1.5  # so that fp16 divides by one
    sent = rule.encode(v, streams(4)).decode()
    unit = 2.0**14 if dtype == torch.float16 else 1.0
    assert torch.equal((sent * unit).to(dtype).float(), sent * unit)
    given, got = v * unit, (sent * unit).to(dtype)
    nearest = given.to(dtype)
    lower = torch.where(nearest.float() <= given, nearest, torch.nextafter(nearest, nearest - nearest.abs() - 1))
    upper = torch.where(lower.float() == given, lower, torch.nextafter(lower, lower + lower.abs() + 1))
    assert bool(((got == lower) | (got == upper)).all())
    assert bool((got == lower).any()) and bool((got == upper).any())


def test_a_number_that_16_bits_hold_comes_back_as_it_was() -> None:
    v = torch.tensor([[1.0, -0.375, 2.0**-20, 0.0, 1.5e-5], [3e38, -1e38, 0.0, 0.0, 0.0]])
    for rule, dtype in ((BFloat16(), torch.bfloat16), (Float16(), torch.float16)):
        exact = v.to(torch.bfloat16).float() if dtype == torch.bfloat16 else v[:1].to(dtype).float()
        assert torch.equal(rule.encode(exact, streams(len(exact))).decode(), exact)
    assert Float16().bits(10) == 9 + 160 and BFloat16().bits(10) == 160


def test_a_number_far_below_the_largest_of_its_row_is_right_on_average_in_16_bits() -> None:
    # beside 1 the least code of fp16 is 2^-38, which stands for 2^-40 one time in four
    rows = 4000
    sent = Float16().encode(torch.tensor([[1.0, 2.0**-40]]).expand(rows, -1), streams(rows)).decode()[:, 1] * 2.0**38
    assert set(sent.tolist()) == {0.0, 1.0}
    assert float(sent.mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / rows) ** 0.5)
