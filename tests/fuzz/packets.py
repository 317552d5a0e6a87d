"""A plain twin of the rules for packets: what of some bytes an encoder can have written, bit by bit in plain Python.

Written from the formats in the compressors' docstrings, and from nothing else of theirs.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from fedsim.compress import COMPRESSORS

P = 33
LIMIT = 2.0**126
TENSORS = 28, 5  # entries of w [7, 4] and of b


class Bits:
    """Integers from a bit string, lowest bit first."""

    def __init__(self, data: bytes) -> None:
        self.rest, self.left = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int, bits: int = 32) -> list[int]:
        """Some integers; IndexError where the string ends before."""
        out = []
        for _ in range(count):
            if self.left < bits:
                raise IndexError
            out.append(self.rest & ((1 << bits) - 1))
            self.rest, self.left = self.rest >> bits, self.left - bits
        return out

    def numbers(self, count: int, least: float = -LIMIT, most: float = LIMIT) -> bool:
        """Whether so many float32 numbers follow, within bounds."""
        values = [struct.unpack("<f", struct.pack("<I", word))[0] for word in self.take(count)]
        return all(least <= value <= most for value in values)

    def indices(self, count: int, size: int) -> bool:
        """Whether so many indices of `size` entries follow, each greater than the one before."""
        values = self.take(count, (size - 1).bit_length())
        return values == sorted(set(values)) and values[-1] < size

    def levels(self, levels: int, size: int) -> bool:
        """Whether a code of sign and level follows for every entry."""
        width = levels.bit_length()
        return all(code & ((1 << width) - 1) <= levels for code in self.take(size, width + 1))

    def at_end(self) -> bool:
        return self.left < 8 and self.rest == 0


def could_be_written(name: str, fields: Mapping[str, Any], data: bytes) -> bool:
    """Whether an encoder with these settings can have written the data for a vector of P entries."""
    bits = Bits(data)
    try:
        return _holds(name, fields, bits, P) and bits.at_end()
    except IndexError:
        return False


def _holds(name: str, fields: Mapping[str, Any], bits: Bits, size: int) -> bool:
    if name == "per_tensor":
        return all(_holds(_name(fields["of"]), vars(fields["of"]), bits, each) for each in TENSORS)
    k = fields.get("k") or max(1, round((fields.get("fraction") or 0) * size))
    seeded = fields.get("shared_seed") or fields.get("common")
    if name in ("rand_k", "top_k"):
        return bits.numbers(k) and (seeded or bits.indices(k, size))
    if name == "composed":
        first, then = fields["first"], fields["then"]
        k = first.k or round(first.fraction * size)
        placed = vars(first).get("common") or bits.indices(k, size)
        return placed and _holds(_name(then), vars(then), bits, k)
    if name == "seeds":  # b, of 5 entries, is a buffer where there is a layout
        count = fields["steps"] * fields.get("directions", 1)
        return bits.numbers(count, -LIMIT / 16 / count, LIMIT / 16 / count) and bits.numbers(
            5 if "layout" in fields else 0
        )
    if name == "adaptive_qsgd":
        s = fields["levels"]
        return bits.numbers(1, 0.0) and bits.numbers(s - 1, 0.0, 1.0) and bits.levels(s, size)
    if name == "bernoulli":
        return bits.take(1, 1) == [0] or bits.numbers(size)
    if name == "natural":
        return all(code & 0xFF <= 254 for code in bits.take(size, 9))
    if name == "bf16":
        return all(code & 0x7FFF < 0x7F80 for code in bits.take(size, 16))
    if name == "fp16":
        return bits.take(1, 9)[0] <= 126 + 149 and all(code & 0x7FFF <= 0x7800 for code in bits.take(size, 16))
    if name == "scaled_sign":
        return bits.numbers(1, 0.0) and len(bits.take(size, 1)) == size
    if name == "powersgd":  # w is tall, so that its left factor is orthonormal; b has 5 entries
        return (
            bits.numbers(14, -1.0 - 2**-10, 1.0 + 2**-10) and bits.numbers(8, -LIMIT / 2, LIMIT / 2) and bits.numbers(5)
        )
    if name == "identity":
        return bits.numbers(size)
    return bits.numbers(1, 0.0) and bits.levels(int(fields.get("levels", 1)), size)


def _name(compressor: object) -> str:
    """Its row of the table."""
    return next(name for name, kind in COMPRESSORS.items() if kind is type(compressor))
