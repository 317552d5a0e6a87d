"""A plain twin of the rules for packets: what of some bytes an encoder can have written, bit by bit in plain Python.

Written from the formats in the compressors' docstrings, and from nothing else of theirs.
"""

from __future__ import annotations

import struct

P = 33
LIMIT = 2.0**126
INDEX = 6  # bits of an index below 33


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

    def indices(self, count: int) -> bool:
        """Whether so many indices follow, each greater than the one before."""
        values = self.take(count, INDEX)
        return values == sorted(set(values)) and values[-1] < P

    def levels(self, levels: int) -> bool:
        """Whether a code of sign and level follows for every entry."""
        width = levels.bit_length()
        return all(code & ((1 << width) - 1) <= levels for code in self.take(P, width + 1))

    def at_end(self) -> bool:
        return self.left < 8 and self.rest == 0


def could_be_written(name: str, fields: dict[str, object], data: bytes) -> bool:
    """Whether an encoder with these settings can have written the data for a vector of P entries."""
    bits = Bits(data)
    try:
        return _holds(name, fields, bits) and bits.at_end()
    except IndexError:
        return False


def _holds(name: str, fields: dict[str, object], bits: Bits) -> bool:
    k = fields.get("k", max(1, round(float(fields.get("fraction", 0)) * P)))  # type: ignore[arg-type]
    assert isinstance(k, int)
    if name in ("rand_k", "top_k"):
        return bits.numbers(k) and (bool(fields.get("shared_seed")) or bits.indices(k))
    if name == "bernoulli":
        return bits.take(1, 1) == [0] or bits.numbers(P)
    if name == "natural":
        return all(code & 0xFF <= 254 for code in bits.take(P, 9))
    if name == "scaled_sign":
        return bits.numbers(1, 0.0) and len(bits.take(P, 1)) == P
    if name == "powersgd":  # w [7, 4] is tall, so that its left factor is orthonormal; b has 5 entries
        return (
            bits.numbers(14, -1.0 - 2**-10, 1.0 + 2**-10) and bits.numbers(8, -LIMIT / 2, LIMIT / 2) and bits.numbers(5)
        )
    if name == "identity":
        return bits.numbers(P)
    return bits.numbers(1, 0.0) and bits.levels(int(fields.get("levels", 1)))  # type: ignore[call-overload]
