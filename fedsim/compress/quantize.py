"""Compressors that send every entry with few bits: QSGD, TernGrad, natural, 16-bit numbers, dithering, scaled sign.

QSGD: Alistarh et al. arXiv:1610.02132. TernGrad: Wen et al. arXiv:1705.07878. Natural compression and dithering:
Horvath et al. arXiv:1905.10988. Scaled sign: Karimireddy et al. arXiv:1901.09847.
Codes have fixed length; an entropy code would be shorter. Probabilities of rounding are multiples of 2^-24.

Rows: a row of zeros comes back as zeros. A row with a NaN or an infinity comes back without one finite entry (natural
compression and bf16 keep it entry by entry, as an infinity), so that a divergence is seen at the receiver.

Letters: C clients in the stack, P entries of a vector, s levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsim.compress.packet import Compressor, Field, Packet, check_stack, code_dtype
from fedsim.compress.words import blocks, uniform
from fedsim.streams import Streams

_LEAST = 149  # 2^-149 is the least float32 number above zero
_NO_SCALE = 511  # of a row that is not finite, which no receiver takes
_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": inf}


class Quantizer(Compressor):
    """A compressor that sends every entry, of whatever vector: it may follow one that chooses entries (`composed`)."""


@dataclass(frozen=True, kw_only=True)
class QSGD(Quantizer):
    """Rounds |v| / norm at random to a multiple of 1 / s (l2 norm): omega = min(P / s^2, sqrt(P) / s).

    Args:
        levels: s, at least 1; an entry costs 1 + ceil(log2(s + 1)) bits.
    """

    levels: int

    def __post_init__(self) -> None:
        if not 1 <= self.levels < 2**16:
            raise ValueError(f"qsgd.levels must be in 1..65535, got {self.levels}")

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return norm_and_codes(num_entries, self.levels)

    def omega(self, num_entries: int) -> float | None:
        return min(num_entries / self.levels**2, sqrt(num_entries) / self.levels)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        payload = _dither(v, self.levels, 2.0, streams.keys("compress.qsgd", step))
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        return _undither(payload, self.levels)


@dataclass(frozen=True, kw_only=True)
class TernGrad(Quantizer):
    """Sends the largest magnitude and, for each entry, -1, 0 or 1 at random: QSGD with one level and the max norm.

    For a given v the constant is exactly max|v| * sum|v| / sum v^2 - 1; `omega` is the largest value of that.
    """

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return norm_and_codes(num_entries, 1)

    def omega(self, num_entries: int) -> float | None:
        # The worst vector has one entry 1 and the others 1 / (1 + sqrt(P)).
        return (sqrt(num_entries) - 1.0) / 2.0

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        payload = _dither(v, 1, inf, streams.keys("compress.terngrad", step))
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        return _undither(payload, 1)


class Shortened(Quantizer):
    """Rounds every entry at random to one of the two float32 numbers with few bits of mantissa beside it.

    With m bits the neighbours of 1 are 2^-m apart, hence omega = 4^-m / (4 (1 + 2^-m)) but for numbers below 2^-126. A
    magnitude that has no upper neighbour among float32 numbers is rounded down.
    """

    mantissa: ClassVar[int]
    name: ClassVar[str]
    """Its row of the table, of which its random numbers are keyed."""

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        most = (255 << self.mantissa) - 1
        return (Field("code", num_entries, 9 + self.mantissa, number=False, most=most, signed=True),)

    def omega(self, num_entries: int) -> float | None:
        step = 2.0**-self.mantissa
        return step * step / (4.0 * (1.0 + step))

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        width = 8 + self.mantissa
        code = torch.empty(v.shape, dtype=code_dtype(1 + width), device=v.device)
        for at, words in blocks(v, streams.keys(f"compress.{self.name}", step)):
            number = v[:, at].to(torch.float32).contiguous()
            code[:, at] = _shorten(number.abs(), words, self.mantissa) | (number.signbit().to(torch.int32) << width)
        return Packet(compressor=self, num_entries=v.shape[1], payload={"code": code})

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        return (payload["code"].to(torch.int32) << (23 - self.mantissa)).view(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Natural(Shortened):
    """Rounds every entry at random to one of the two powers of two beside it: 9 bits an entry, omega = 1/8."""

    mantissa: ClassVar[int] = 0
    name: ClassVar[str] = "natural"


@dataclass(frozen=True, kw_only=True)
class BFloat16(Shortened):
    """Rounds every entry at random to one of the two bfloat16 numbers beside it: 16 bits an entry, omega = 2^-16."""

    mantissa: ClassVar[int] = 7
    name: ClassVar[str] = "bf16"


@dataclass(frozen=True, kw_only=True)
class Float16(Quantizer):
    """Rounds every entry at random to one of the two float16 numbers beside it: 9 + 16 P bits, omega = 2^-22.

    The row is first divided by the power of two below its largest magnitude, so that none leaves float16's range:
    11 bits of an entry count down to 2^-28 of the largest one, and below that fewer.
    """

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        scale = Field("scale", 1, 9, number=False, least=0, most=126 + _LEAST)
        return scale, Field("code", num_entries, 16, number=False, most=0x7800, signed=True)

    def omega(self, num_entries: int) -> float | None:
        # the coarse grid's step is 2^-38 of the scale, which no row is shorter than
        return 2.0**-22 + num_entries * 2.0**-78

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        largest = norm_of(v, inf)[0].to(torch.float32)
        scale = (torch.frexp(largest).exponent - 1 + _LEAST).clamp_(min=0)
        scale = torch.where(largest.isfinite(), scale, _NO_SCALE).to(code_dtype(9))
        code = torch.empty(v.shape, dtype=code_dtype(16), device=v.device)
        for at, words in blocks(v, streams.keys("compress.fp16", step)):
            share = (v[:, at].to(torch.float32) / _power(scale)).contiguous()
            size = share.abs().mul_(2.0**14).clamp_(max=2.0**15)
            normal = _shorten(size, words, 10) - ((127 - 15) << 10)
            fixed = (size * 2.0**24 + uniform(words)).to(torch.int32)  # below 2^-14 codes are 2^-24 apart
            code[:, at] = torch.where(size < 2.0**-14, fixed, normal) | sign_bit(share, 15)
        return Packet(compressor=self, num_entries=v.shape[1], payload={"scale": scale, "code": code})

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        half = payload["code"].to(torch.int16).view(torch.float16).to(torch.float32)
        return half.mul_(2.0**-14).mul_(_power(payload["scale"]))


@dataclass(frozen=True, kw_only=True)
class NaturalDithering(Quantizer):
    """Rounds |v| / norm at random to one of the levels 1, 1/2, ..., 2^(1-s), 0.

    omega = 1/8 + t * min(1, t) with t = P^(1/r) / 2^(s-1) and r = 1 for the l1 norm, 2 for l2 and linf.

    Args:
        levels: s, at least 1; an entry costs 1 + ceil(log2(s + 1)) bits.
        norm: l1, l2 or linf.
    """

    levels: int
    norm: Literal["l1", "l2", "linf"] = "l2"

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 126:
            raise ValueError(f"natural_dithering.levels must be in 1..126, got {self.levels}")
        if self.norm not in _ORDERS:
            raise ValueError(f"natural_dithering.norm must be one of {', '.join(_ORDERS)}, got {self.norm!r}")

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return norm_and_codes(num_entries, self.levels)

    def omega(self, num_entries: int) -> float | None:
        t = num_entries ** (1.0 / min(_ORDERS[self.norm], 2.0)) / 2.0 ** (self.levels - 1)
        return 1 / 8 + t * min(1.0, t)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        norm, divisor = norm_of(v, _ORDERS[self.norm])
        code = torch.empty(v.shape, dtype=torch.uint8, device=v.device)
        for at, words in blocks(v, streams.keys("compress.natural_dithering", step)):
            share = (v[:, at] / divisor).to(torch.float32)
            size = share.abs().clamp_(max=1.0)
            level = _shorten(size, words, 0) - (127 - self.levels)  # 1 -> s, 1/2 -> s - 1, ...
            chance = size * 2.0 ** (self.levels - 1)  # of the least level, for what lies below it
            level = torch.where(chance < 1.0, (uniform(words) < chance).to(torch.int32), level)
            code[:, at] = level.clamp_(max=self.levels) | sign_bit(share, self.levels.bit_length())
        return Packet(compressor=self, num_entries=v.shape[1], payload={"norm": norm, "code": code})

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        norm = payload["norm"]
        powers = 2.0 ** torch.arange(1 - self.levels, 1, dtype=norm.dtype, device=norm.device)
        return look_up(payload["code"], torch.cat([powers.new_zeros(1), powers]), self.levels.bit_length()).mul_(norm)


@dataclass(frozen=True, kw_only=True)
class ScaledSign(Quantizer):
    """Sends mean|v| and one sign an entry, with the sign of 0 counted as +: 32 + P bits, delta <= P."""

    unbiased: ClassVar[bool] = False

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return Field("scale", 1, least=0.0), Field("code", num_entries, 1, number=False)

    def delta(self, num_entries: int) -> float | None:
        return float(num_entries)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        scale = v.abs().mean(dim=1, keepdim=True)
        payload = {"scale": scale, "code": (v < 0).view(torch.uint8)}
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        scale = payload["scale"]
        return payload["code"].to(scale.dtype).mul_(-2.0).add_(1.0).mul_(scale)


def norm_and_codes(num_entries: int, levels: int) -> tuple[Field, Field]:
    """A norm, and for every entry one of the levels 0..s with a sign bit above it."""
    code = Field("code", num_entries, 1 + levels.bit_length(), number=False, most=levels, signed=True)
    return Field("norm", 1, least=0.0), code


def norm_of(v: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Each row's norm [C, 1], and the same with 1 for 0, to divide by."""
    if order == inf:
        low, high = torch.aminmax(v, dim=1, keepdim=True)
        norm = torch.maximum(-low, high)
    elif order == 1.0:
        norm = v.abs().sum(dim=1, keepdim=True)
    else:
        norm = torch.linalg.vecdot(v, v)[:, None].sqrt()
        extreme = ((norm < 1e-15) | (norm > 1e15)).nonzero()[:, 0]
        if extreme.numel():  # squares leave the range of float32: a slower way
            norm[extreme] = torch.linalg.vector_norm(v[extreme], dim=1, keepdim=True, dtype=torch.float64).to(v.dtype)
    return norm, torch.where(norm > 0, norm, 1.0)


def _dither(v: Tensor, levels: int, order: float, keys: Tensor) -> dict[str, Tensor]:
    """Norm [C, 1] and codes [C, P]: the level |v| / norm * s rounded at random, and above it the sign bit."""
    check_stack(v)
    norm, divisor = norm_of(v, order)
    width = levels.bit_length()
    code = torch.empty(v.shape, dtype=code_dtype(width + 1), device=v.device)
    # Levels as integers with `point` binary places: adding random places and dropping them rounds without bias.
    point = min(24, 30 - width)
    for at, words in blocks(v, keys):
        share = v[:, at] / divisor
        fixed = share.abs().mul_(levels * 2.0**point).to(torch.int32)
        level = ((fixed + ((words >> 2) & ((1 << point) - 1))) >> point).clamp_(0, levels)
        code[:, at] = level | sign_bit(share, width)
    return {"norm": norm, "code": code}


def _undither(payload: Mapping[str, Tensor], levels: int) -> Tensor:
    norm = payload["norm"]
    level = torch.arange(levels + 1, dtype=norm.dtype, device=norm.device)
    return look_up(payload["code"], level, levels.bit_length()).mul_(norm / levels)


def sign_bit(v: Tensor, width: int) -> Tensor:
    """int32 with bit `width` set where v is below zero (or -0)."""
    if v.dtype == torch.float32:
        return (v.contiguous().view(torch.int32) >> 31) & (1 << width)
    return v.signbit().to(torch.int32) << width


def look_up(code: Tensor, level: Tensor, width: int) -> Tensor:
    """The stack [C, P] whose codes point to levels [s + 1], negated where bit `width` is set."""
    spare = level.new_zeros((1 << width) - level.numel())  # codes that no encoder writes
    table = torch.cat([level, spare, -level, spare])
    return table.index_select(0, code.flatten().to(torch.int32)).view(code.shape)


def _shorten(size: Tensor, words: Tensor, mantissa: int) -> Tensor:
    """The upper 8 + m bits (int32) of float32 numbers >= 0, rounded at random to m bits of mantissa without bias."""
    # Adding random bits to those that go carries into those that stay with probability rest / step: exactly the chance
    # that makes the mean right. Numbers below 2^-126 work too, of which 0 is one.
    bits = size.view(torch.int32).clamp(max=0x7F800000)
    kept = (bits + (((words >> 9) & 0x7FFFFF) >> mantissa)) >> (23 - mantissa)
    infinity = 255 << mantissa
    return torch.where(bits < 0x7F800000, kept.clamp_(max=infinity - 1), infinity)


def _power(scale: Tensor) -> Tensor:
    """2^(scale - 149) as float32 [C, 1], and NaN where a row has none."""
    return torch.where(scale == _NO_SCALE, torch.nan, torch.exp2(scale.to(torch.float64) - _LEAST)).to(torch.float32)
