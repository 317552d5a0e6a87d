"""Compressors that send every entry with few bits: QSGD, TernGrad, natural, natural dithering, scaled sign.

QSGD: Alistarh et al. arXiv:1610.02132. TernGrad: Wen et al. arXiv:1705.07878. Natural compression and dithering:
Horvath et al. arXiv:1905.10988. Scaled sign: Karimireddy et al. arXiv:1901.09847.
Codes have fixed length; an entropy code would be shorter. Probabilities of rounding are multiples of 2^-24.

Rows: a row of zeros comes back as zeros. A row with a NaN or an infinity comes back without one finite entry (natural
compression keeps it entry by entry, as an infinity), so that a divergence is seen at the receiver.

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

_LARGEST = 254  # the biased exponent of the largest power of two; 255 is infinity
_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": inf}


@dataclass(frozen=True, kw_only=True)
class QSGD(Compressor):
    """Rounds |v| / norm at random to a multiple of 1 / s (l2 norm): omega = min(P / s^2, sqrt(P) / s).

    Args:
        levels: s, at least 1; an entry costs 1 + ceil(log2(s + 1)) bits.
    """

    levels: int

    def __post_init__(self) -> None:
        if not 1 <= self.levels < 2**16:
            raise ValueError(f"qsgd.levels must be in 1..65535, got {self.levels}")

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return _norm_and_codes(num_entries, self.levels)

    def omega(self, num_entries: int) -> float | None:
        return min(num_entries / self.levels**2, sqrt(num_entries) / self.levels)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        payload = _dither(v, self.levels, 2.0, streams.keys("compress.qsgd", step))
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        return _undither(payload, self.levels)


@dataclass(frozen=True, kw_only=True)
class TernGrad(Compressor):
    """Sends the largest magnitude and, for each entry, -1, 0 or 1 at random: QSGD with one level and the max norm.

    For a given v the constant is exactly max|v| * sum|v| / sum v^2 - 1; `omega` is the largest value of that.
    """

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return _norm_and_codes(num_entries, 1)

    def omega(self, num_entries: int) -> float | None:
        # The worst vector has one entry 1 and the others 1 / (1 + sqrt(P)).
        return (sqrt(num_entries) - 1.0) / 2.0

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        payload = _dither(v, 1, inf, streams.keys("compress.terngrad", step))
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        return _undither(payload, 1)


@dataclass(frozen=True, kw_only=True)
class Natural(Compressor):
    """Rounds every entry at random to one of the two powers of two beside it: 9 bits an entry, omega = 1/8.

    A magnitude of 2^127 or more has no upper neighbour among float32 numbers and is rounded down.
    """

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return (Field("code", num_entries, 9, number=False, most=_LARGEST, signed=True),)

    def omega(self, num_entries: int) -> float | None:
        return 1 / 8

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        code = torch.empty(v.shape, dtype=torch.int16, device=v.device)
        for at, words in blocks(v, streams.keys("compress.natural", step)):
            number = v[:, at].to(torch.float32).contiguous()
            code[:, at] = _round_to_power(number.abs(), words) | (number.signbit().to(torch.int32) << 8)
        return Packet(compressor=self, num_entries=v.shape[1], payload={"code": code})

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        code = payload["code"].to(torch.int32)
        # Sign to bit 31, exponent to bits 23..30: a float32 with an empty mantissa.
        return (((code & 0x100) << 23) | ((code & 0xFF) << 23)).view(torch.float32)


@dataclass(frozen=True, kw_only=True)
class NaturalDithering(Compressor):
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
        return _norm_and_codes(num_entries, self.levels)

    def omega(self, num_entries: int) -> float | None:
        t = num_entries ** (1.0 / min(_ORDERS[self.norm], 2.0)) / 2.0 ** (self.levels - 1)
        return 1 / 8 + t * min(1.0, t)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        norm, divisor = _norm(v, _ORDERS[self.norm])
        code = torch.empty(v.shape, dtype=torch.uint8, device=v.device)
        for at, words in blocks(v, streams.keys("compress.natural_dithering", step)):
            share = (v[:, at] / divisor).to(torch.float32)
            size = share.abs().clamp_(max=1.0)
            level = _round_to_power(size, words) - (127 - self.levels)  # 1 -> s, 1/2 -> s - 1, ...
            chance = size * 2.0 ** (self.levels - 1)  # of the least level, for what lies below it
            level = torch.where(chance < 1.0, (uniform(words) < chance).to(torch.int32), level)
            code[:, at] = level.clamp_(max=self.levels) | _sign_bit(share, self.levels.bit_length())
        return Packet(compressor=self, num_entries=v.shape[1], payload={"norm": norm, "code": code})

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        norm = payload["norm"]
        powers = 2.0 ** torch.arange(1 - self.levels, 1, dtype=norm.dtype, device=norm.device)
        return _look_up(payload["code"], torch.cat([powers.new_zeros(1), powers]), self.levels.bit_length()).mul_(norm)


@dataclass(frozen=True, kw_only=True)
class ScaledSign(Compressor):
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


def _norm_and_codes(num_entries: int, levels: int) -> tuple[Field, Field]:
    """A norm, and for every entry one of the levels 0..s with a sign bit above it."""
    code = Field("code", num_entries, 1 + levels.bit_length(), number=False, most=levels, signed=True)
    return Field("norm", 1, least=0.0), code


def _norm(v: Tensor, order: float) -> tuple[Tensor, Tensor]:
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
    norm, divisor = _norm(v, order)
    width = levels.bit_length()
    code = torch.empty(v.shape, dtype=code_dtype(width + 1), device=v.device)
    # Levels as integers with `point` binary places: adding random places and dropping them rounds without bias.
    point = min(24, 30 - width)
    for at, words in blocks(v, keys):
        share = v[:, at] / divisor
        fixed = share.abs().mul_(levels * 2.0**point).to(torch.int32)
        level = ((fixed + ((words >> 2) & ((1 << point) - 1))) >> point).clamp_(0, levels)
        code[:, at] = level | _sign_bit(share, width)
    return {"norm": norm, "code": code}


def _undither(payload: Mapping[str, Tensor], levels: int) -> Tensor:
    norm = payload["norm"]
    level = torch.arange(levels + 1, dtype=norm.dtype, device=norm.device)
    return _look_up(payload["code"], level, levels.bit_length()).mul_(norm / levels)


def _sign_bit(v: Tensor, width: int) -> Tensor:
    """int32 with bit `width` set where v is below zero (or -0)."""
    if v.dtype == torch.float32:
        return (v.contiguous().view(torch.int32) >> 31) & (1 << width)
    return v.signbit().to(torch.int32) << width


def _look_up(code: Tensor, level: Tensor, width: int) -> Tensor:
    """The stack [C, P] whose codes point to levels [s + 1], negated where bit `width` is set."""
    spare = level.new_zeros((1 << width) - level.numel())  # codes that no encoder writes
    table = torch.cat([level, spare, -level, spare])
    return table.index_select(0, code.flatten().to(torch.int32)).view(code.shape)


def _round_to_power(size: Tensor, words: Tensor) -> Tensor:
    """Biased exponents (int32) of float32 numbers >= 0, rounded at random to a power of two without bias."""
    # Adding 23 random bits to the mantissa carries into the exponent with probability mantissa / 2^23: exactly the
    # chance that makes the mean right. Numbers below 2^-126 work too, their neighbours being 0 and 2^-126.
    bits = size.view(torch.int32).clamp(max=0x7F800000)
    exponent = (bits + ((words >> 9) & 0x7FFFFF)) >> 23
    return torch.where(bits < 0x7F800000, exponent.clamp_(max=_LARGEST), 255)
