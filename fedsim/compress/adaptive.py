"""Adaptive quantization: QSGD with levels where the vector's entries are.

Faghri, Tabrizian, Markov, Alistarh, Roy, Ramezani-Kebrya. Adaptive gradient quantization for data-parallel SGD.
arXiv:2010.12460: ALQ, coordinate descent on the levels. Departure: they are fitted to the vector that is sent, and go
with it, not to a mixture of normal distributions that all workers fit to many.

Between neighbours a <= x <= b rounding at random has the variance (x - a)(b - x). That of all entries is convex in one
level l between a and b, with the slope: sum over [a, l] of (x - a) less sum over [l, b] of (b - x); so the best l is
where this changes its sign, at an entry. From QSGD's levels on the variance only falls, so that its omega holds. The
lowest level is 0 and the highest 1 for every vector, so that only those between are sent.

Letters: C clients in the stack, P entries of a vector, s levels above 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.compress.packet import Field, Packet, check_stack, code_dtype
from fedsim.compress.quantize import QSGD, Quantizer, look_up, norm_and_codes, norm_of, sign_bit
from fedsim.compress.words import blocks, uniform
from fedsim.streams import Streams

_SWEEPS = 3  # over all levels; more change little


@dataclass(frozen=True, kw_only=True)
class AdaptiveQSGD(Quantizer):
    """QSGD with levels fitted to the vector and sent along, 32 (s - 1) bits: omega = min(P / s^2, sqrt(P) / s) at most.

    Args:
        levels: s, at least 1; an entry costs 1 + ceil(log2(s + 1)) bits.
    """

    levels: int

    def __post_init__(self) -> None:
        if not 1 <= self.levels < 2**8:
            raise ValueError(f"adaptive_qsgd.levels must be in 1..255, got {self.levels}")

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        norm, code = norm_and_codes(num_entries, self.levels)
        return norm, Field("levels", self.levels - 1, least=0.0, most=1.0), code

    def omega(self, num_entries: int) -> float | None:
        return QSGD(levels=self.levels).omega(num_entries)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        norm, divisor = norm_of(v, 2.0)
        share = (v / divisor).abs().clamp_(max=1.0).contiguous()
        level = _fitted(share.sort(dim=1).values, self.levels)
        width = self.levels.bit_length()
        code = torch.empty(v.shape, dtype=code_dtype(width + 1), device=v.device)
        for at, words in blocks(v, streams.keys("compress.adaptive_qsgd", step)):
            x = share[:, at].contiguous()
            upper = torch.searchsorted(level, x).clamp_(1, self.levels)  # the first level that is no less
            low, high = level.gather(1, upper - 1), level.gather(1, upper)
            chance = (x - low) / torch.where(high > low, high - low, 1.0)
            found = upper - 1 + (uniform(words) < chance).to(torch.int64)
            code[:, at] = found.to(torch.int32) | sign_bit(v[:, at], width)
        payload = {"norm": norm, "levels": level[:, 1:-1], "code": code}
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        between = payload["levels"]
        level = torch.cat([between.new_zeros(len(between), 1), between, between.new_ones(len(between), 1)], dim=1)
        rows = zip(payload["code"], level, strict=True)
        return torch.stack([look_up(code, own, self.levels.bit_length()) for code, own in rows]).mul_(payload["norm"])


def _fitted(x: Tensor, levels: int) -> Tensor:
    """[C, s + 1] levels from 0 to 1 for ascending entries x [C, P] in [0, 1]; of a row with NaN they may be NaN."""
    level = torch.linspace(0.0, 1.0, levels + 1, dtype=x.dtype, device=x.device).repeat(len(x), 1)
    total = torch.nn.functional.pad(x.double().cumsum(dim=1), (1, 0))  # of the first entries
    for _ in range(_SWEEPS):
        for j in range(1, levels):
            a, b = level[:, j - 1, None].contiguous(), level[:, j + 1, None].contiguous()
            level[:, j] = _best(x, total, a, b)[:, 0]
    return level


def _best(x: Tensor, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[C, 1]: where between a and b [C, 1] the slope of the variance changes its sign; a if no entry is there."""
    first, last = torch.searchsorted(x, a), torch.searchsorted(x, b, right=True)
    low, high = first, last
    # the first entry m up to which (x - a) adds up to at least what (b - x) does behind it
    for _ in range(x.shape[1].bit_length()):
        m = ((low + high) // 2).clamp_(max=x.shape[1] - 1)
        below = total.gather(1, m + 1) - total.gather(1, first) - a * (m + 1 - first)
        above = b * (last - m - 1) - (total.gather(1, last) - total.gather(1, m + 1))
        enough = below >= above
        low, high = torch.where(enough, low, m + 1), torch.where(enough, m, high)
    found = x.gather(1, low.clamp(max=x.shape[1] - 1))
    return torch.where(last > first, torch.minimum(torch.maximum(found, a), b), a)
