"""Compressors that send some entries as they are: identity, Rand-k, Top-k, Bernoulli.

Constants: Beznosikov, Horvath, Richtarik, Safaryan. On biased compression for distributed learning. JMLR 24 (2023).
An index costs ceil(log2 P) bits.

Letters: C clients in the stack, P entries of a vector, k of them sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.compress.packet import FLOAT_BITS, Compressor, Field, Packet, check_stack, code_dtype
from fedsim.compress.words import sample, uniform, words64
from fedsim.streams import Streams


@dataclass(frozen=True, kw_only=True)
class Identity(Compressor):
    """Sends every entry: 32 P bits. The packet holds the stack itself and not a copy."""

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return (Field("values", num_entries),)

    def omega(self, num_entries: int) -> float | None:
        return 0.0

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        return Packet(compressor=self, num_entries=v.shape[1], payload={"values": v})

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        return payload["values"]


@dataclass(frozen=True, kw_only=True)
class Chosen(Compressor):
    """Sends k entries and where they stand.

    Args:
        k: entries to send; or
        fraction: of the P entries, rounded, at least one.
    """

    k: int | None = None
    fraction: float | None = None
    name: ClassVar[str]
    """What messages call it: its row of the table."""

    def __post_init__(self) -> None:
        if (self.k is None) == (self.fraction is None):
            raise ValueError(
                f"{self.name} needs exactly one of k and fraction, got k={self.k} and fraction={self.fraction}"
            )
        if self.k is not None and self.k < 1:
            raise ValueError(f"{self.name}.k must be at least 1 entry, got {self.k}")
        if self.fraction is not None and not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"{self.name}.fraction must be in (0, 1], got {self.fraction}")

    def count(self, num_entries: int) -> int:
        """k for vectors of P entries.

        Raises:
            ValueError: if they have fewer.
        """
        if self.k is None:
            assert self.fraction is not None
            return max(1, round(self.fraction * num_entries))
        if self.k > num_entries:
            raise ValueError(
                f"{self.name}.k={self.k} exceeds the {num_entries} entries of a vector; lower k or give a fraction"
            )
        return self.k

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        values, index = payload["values"], payload["index"]
        return values.new_zeros(values.shape[0], num_entries).scatter_(1, index.long(), values)


@dataclass(frozen=True, kw_only=True)
class RandK(Chosen):
    """Sends k random entries, scaled by P / k so that the mean is right: omega = P / k - 1.

    Args:
        shared_seed: the receiver draws the same indices from the run's seed, so that they cost nothing.
        common: all clients draw the same indices in jobs of the same number, likewise from the seed and for nothing:
            where all clients take part in every round, the mean of their vectors has k entries, too.
    """

    name: ClassVar[str] = "rand_k"
    shared_seed: bool = False
    common: bool = False

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        k = self.count(num_entries)
        return Field("values", k), _index_field(num_entries, k, self._seeded)

    def shared(self, streams: Streams, num_entries: int, step: int = 0) -> dict[str, Tensor]:
        return {"index": self._index(streams, num_entries, step)} if self._seeded else {}

    def omega(self, num_entries: int) -> float | None:
        return num_entries / self.count(num_entries) - 1.0

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        index = self._index(streams, v.shape[1], step)
        values = v.gather(1, index.long()) * (v.shape[1] / index.shape[1])
        return Packet(compressor=self, num_entries=v.shape[1], payload={"values": values, "index": index})

    @property
    def _seeded(self) -> bool:
        return self.shared_seed or self.common

    def _index(self, streams: Streams, num_entries: int, step: int) -> Tensor:
        if self.common:
            streams = replace(streams, clients=torch.zeros_like(streams.clients))
        chosen = sample(streams, num_entries, self.count(num_entries), "compress.rand_k", step)
        return chosen.to(code_dtype(_index_bits(num_entries)))


@dataclass(frozen=True, kw_only=True)
class TopK(Chosen):
    """Sends the k entries of largest magnitude, unscaled; of equal ones the first. delta = P / k.

    NaN counts as the largest magnitude, then infinity.
    """

    name: ClassVar[str] = "top_k"
    unbiased: ClassVar[bool] = False

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        k = self.count(num_entries)
        return Field("values", k), _index_field(num_entries, k)

    def delta(self, num_entries: int) -> float | None:
        return num_entries / self.count(num_entries)

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        index = _largest(v, self.count(v.shape[1]))
        payload = {"values": v.gather(1, index), "index": index.to(code_dtype(_index_bits(v.shape[1])))}
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Compressor):
    """Sends the whole vector, divided by p, with probability p, and else only a flag: omega = 1 / p - 1.

    Args:
        p: probability of sending, in (0, 1].
    """

    p: float

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0:
            raise ValueError(f"bernoulli.p must be a probability in (0, 1], got {self.p}")

    def fields(self, num_entries: int) -> tuple[Field, ...]:
        return Field("sent", 1, 1, number=False), Field("values", num_entries, optional=True)

    def bits(self, num_entries: int) -> int:
        """The mean: one bit for the flag and 32 P with probability p."""
        return 1 + ceil(self.p * FLOAT_BITS * num_entries)

    def omega(self, num_entries: int) -> float | None:
        return 1.0 / self.p - 1.0

    def encode(self, v: Tensor, streams: Streams, step: int = 0) -> Packet:
        check_stack(v)
        words = words64(streams.keys("compress.bernoulli", step), 0, 1).view(torch.int32)
        sent = uniform(words[:, :1]) < self.p
        values = torch.where(sent, v / self.p, 0.0)
        payload = {"sent": sent.to(torch.uint8), "values": values}
        return Packet(compressor=self, num_entries=v.shape[1], payload=payload)

    def decode(self, payload: Mapping[str, Tensor], num_entries: int) -> Tensor:
        return payload["values"]


def _index_field(num_entries: int, k: int, shared: bool = False) -> Field:
    """Where k of P entries stand."""
    bits, last = _index_bits(num_entries), num_entries - 1
    return Field("index", k, bits, number=False, shared=shared, least=0, most=last, ascending=True)


def _index_bits(num_entries: int) -> int:
    """ceil(log2 P), exactly."""
    return (num_entries - 1).bit_length()


def _largest(v: Tensor, k: int) -> Tensor:
    """[C, k] int64, ascending: where each row's k largest magnitudes stand, the first of equal ones."""
    # Bits of a magnitude, read as an integer, are in the order of the magnitudes, with infinity and NaN above all.
    size = v.detach().abs().view(torch.int32 if v.dtype == torch.float32 else torch.int64)
    if v.device.type == "cpu" and v.shape[1] >= _LONG_ROW:
        return torch.from_numpy(np.stack([_largest_of_row(row, k) for row in size.numpy()]))
    threshold = torch.topk(size, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    chosen = size >= threshold
    surplus = chosen.sum(dim=1, keepdim=True) - k
    tied = surplus[:, 0].nonzero()[:, 0]
    if tied.numel():
        equal = size[tied] == threshold[tied]
        last = equal.cumsum(dim=1) > equal.sum(dim=1, keepdim=True) - surplus[tied]
        chosen[tied] &= ~(equal & last)
    return chosen.nonzero()[:, 1].view(-1, k)


_LONG_ROW = 1 << 15  # from here on a row is worth a loop of its own on a CPU: ten times faster than the whole stack


def _largest_of_row(size: np.ndarray, k: int) -> np.ndarray:
    """The same for one row of integers: a sample guesses a threshold, and only what passes it is looked at closely."""
    sample_of_row = size[::61]
    rank = int(1.3 * k / 61) + 20
    passed = np.arange(size.size)
    if rank < sample_of_row.size:
        guess = np.partition(sample_of_row, -rank)[-rank]
        passed = np.flatnonzero(size >= guess)
    if passed.size < k:  # the sample misled
        passed = np.arange(size.size)
    close = size[passed]
    threshold = np.partition(close, -k)[-k]
    surplus = np.count_nonzero(close >= threshold) - k
    drop = np.flatnonzero(close == threshold)[::-1][:surplus]
    keep = close >= threshold
    keep[drop] = False
    return passed[keep]
