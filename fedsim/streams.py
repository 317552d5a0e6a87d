"""Keyed random numbers: one stream per (seed, purpose, client, job, step).

A number depends on its key and on its index in the stream, never on the row its client has in a stack, the
process it runs in or the order of arrival. So the same seed gives the same numbers for any stack width and
any number of workers. The generator is SplitMix64 (Steele, Lea, Flood. Fast splittable pseudorandom number
generators. OOPSLA 2014), which needs no state beyond its key and is a handful of integer operations per number
for all clients of a stack at once, on a CPU or a GPU.

Letters: C clients in the stack, n numbers per client.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) shift of signed 64-bit integers."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    z = z ^ _shift_right(z, 30)
    z *= _MIX1  # from here on in place: masks of dropout are made of many such numbers
    z ^= _shift_right(z, 27)
    z *= _MIX2
    z ^= _shift_right(z, 31)
    return z


def _bits_of(keys: Tensor, n: int) -> Tensor:
    """[C, n] int64: the first n numbers of the streams with these keys [C]."""
    index = torch.arange(1, n + 1, device=keys.device)
    return mix64(keys[:, None] + index * _GOLDEN)


def as_uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers uniform on [0, 1) from 64 random bits each: 24 of them in float32, 53 in float64."""
    digits = 53 if dtype == torch.float64 else 24
    return _shift_right(bits, 64 - digits).to(dtype) * 2.0**-digits


def normal_of(keys: Tensor, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[C, n] standard normal numbers of the streams with these keys [C], as `Streams.normal` draws them."""
    half = (n + 1) // 2
    u = as_uniform(_bits_of(keys, 2 * half), torch.float64)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[:, :half]))
    angle = u[:, half:] * (2.0 * torch.pi)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :n].to(dtype)


def _hash64(*parts: object) -> int:
    """A signed 64-bit integer from a few plain values, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def server_rng(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    """The server's own generator for one purpose and one step (round)."""
    key = _hash64(seed, purpose) & (2**64 - 1)
    return np.random.Generator(np.random.Philox(key=np.array([key, step], dtype=np.uint64)))


@dataclass(frozen=True)
class Streams:
    """The streams of a stack of clients.

    Args:
        seed: the run's seed.
        clients: [C] int64 client ids.
        jobs: [C] int64 job indices: how many jobs that client had before; or [1], the same for all.

    >>> s = Streams(0, torch.tensor([3, 5]), torch.tensor([0, 0]))
    >>> torch.equal(s.uniform("x", 4)[1], s.rows([1]).uniform("x", 4)[0])
    True
    """

    seed: int
    clients: Tensor
    jobs: Tensor

    def rows(self, which: slice | list[int] | Tensor) -> Streams:
        """The streams of some rows of the stack."""
        return replace(self, clients=self.clients[which], jobs=self.jobs[which])

    def keys(self, purpose: str, step: int = 0) -> Tensor:
        """[C] int64: each client's key for a purpose and a step."""
        return mix64(mix64(self._by_client + self.base(purpose, step)) + self._by_job)

    def base(self, purpose: str, step: int) -> int | Tensor:
        """What the keys of all clients have in common."""
        return _hash64(self.seed, purpose, step)

    @cached_property
    def on_host(self) -> Streams:
        """The same streams with their numbers drawn on the host; of a device's it waits once."""
        return Streams(self.seed, self.clients.cpu(), self.jobs.cpu())

    @cached_property
    def _by_client(self) -> Tensor:
        return self.clients * _GOLDEN

    @cached_property
    def _by_job(self) -> Tensor:
        return mix64(self.jobs + 1) * _GOLDEN

    def bits(self, purpose: str, n: int, step: int = 0) -> Tensor:
        """[C, n] int64, every bit random (numbers may be negative)."""
        return _bits_of(self.keys(purpose, step), n)

    def uniform(self, purpose: str, *shape: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """[C, *shape] uniform on [0, 1)."""
        return as_uniform(self.bits(purpose, prod(shape), step), dtype).view(-1, *shape)

    def normal(self, purpose: str, *shape: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """[C, *shape] standard normal, by Box and Muller's transform in float64."""
        return normal_of(self.keys(purpose, step), prod(shape), dtype).reshape(-1, *shape)

    def rademacher(self, purpose: str, *shape: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """[C, *shape] of -1 and +1 with equal chance."""
        return (_shift_right(self.bits(purpose, prod(shape), step), 63) * 2 - 1).to(dtype).view(-1, *shape)

    def permutation(self, purpose: str, counts: Tensor, step: int = 0, width: int | None = None) -> Tensor:
        """Random orders of 0..counts-1, one per client.

        Args:
            purpose, step: of the key.
            counts: [C].
            width: columns, no fewer than any count; None asks the device for the largest.

        Returns:
            [C, width] int64; beyond a client's count stand the unused positions in order.
        """
        if width is None:
            width = int(counts.max()) if counts.numel() else 0
        keys = _shift_right(self.bits(purpose, width, step), 1)
        column = torch.arange(width, device=keys.device)
        keys = torch.where(column < counts[:, None], keys, torch.iinfo(torch.int64).max)
        return torch.sort(keys, dim=1, stable=True).indices
