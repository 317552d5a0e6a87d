"""Gradient codes: who computes the gradients of which chunks of the data, and how their sum is decoded.

Tandon, Lei, Dimakis, Karampatziakis. Gradient Coding: Avoiding Stragglers in Distributed Learning. ICML 2017,
arXiv:1612.03301: the cyclic code (algorithm 2) and fractional repetition.

Worker i sends l_i = sum_j B_ij g_j; for the workers I that answered, a with a' B_I = 1' gives the sum of all g_j.
The cyclic code's coefficients grow with n and s: in float32 a decoded gradient of 256 workers is right to about 1e-2 of
its norm, one of 7 to 1e-6. Fractional repetition adds plain sums and loses nothing.

Letters: n workers and as many chunks, s stragglers that are tolerated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.streams import server_rng

CodeName = Literal["cyclic", "repetition"]
RESIDUAL = 1e-6  # of a' B_I - 1', beyond which a pattern does not decode


@dataclass(frozen=True)
class Code:
    """A gradient code; the same numbers make the same code everywhere.

    Args:
        name: cyclic, whose worker i has the chunks i .. i + s, or repetition, where s + 1 workers share each block of
            s + 1 chunks.
        n: workers.
        s: stragglers that are tolerated; 0 is no code.
        why: what s follows from, for messages.
    """

    name: CodeName
    n: int
    s: int
    why: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.s < self.n:
            raise ValueError(
                f"s={self.s}{self.why} cannot be decoded with {self.n} workers, each of which has s + 1 of as many "
                f"chunks: s must lie in [0, {self.n - 1}]; lower it or raise clients.count"
            )
        if self.name == "repetition" and self.n % (self.s + 1):
            near = min((d for d in range(1, self.n + 1) if self.n % d == 0), key=lambda d: abs(d - self.s - 1)) - 1
            raise ValueError(
                f"code=repetition deals blocks of s + 1 = {self.s + 1}{self.why} chunks, which does not divide the "
                f"{self.n} workers; take s={near}, another clients.count, or code: cyclic"
            )

    @property
    def matrix(self) -> Tensor:
        """B [n, n] float64."""
        return _cyclic(self.n, self.s) if self.name == "cyclic" else _repetition(self.n, self.s)

    def suffices(self, answered: Tensor) -> bool:
        """Whether the sum can be decoded from the workers answered [n] bool."""
        if self.name == "cyclic":
            return int(answered.sum()) >= self.n - self.s
        return bool(answered.view(-1, self.s + 1).any(1).all())

    def decode(self, answered: Tensor) -> Tensor:
        """a [n] float64, 0 for workers that are not needed.

        Args:
            answered: [n] bool.

        Raises:
            ValueError: if these do not suffice, or the code is too large for its numbers.

        >>> a = Code("cyclic", 3, 1).decode(torch.tensor([True, False, True]))
        >>> torch.allclose(a @ Code("cyclic", 3, 1).matrix, torch.ones(3).double())
        True
        """
        if not self.suffices(answered):
            raise ValueError(
                f"{int(answered.sum())} of {self.n} workers answered, which a code of s={self.s} can't decode"
            )
        a = torch.zeros(self.n, dtype=torch.float64)
        if self.name == "repetition":
            first = answered.view(-1, self.s + 1).int().argmax(1)  # of each block's workers the first that answered
            a[first + torch.arange(len(first)) * (self.s + 1)] = 1.0
            return a
        if not self.s:
            return torch.ones_like(a)
        late, (everybody, free) = ~answered, _solutions(self.n, self.s)
        z = np.linalg.lstsq(free[late].numpy(), -everybody[late].numpy(), rcond=None)[0]  # so that a is 0 there
        a = torch.where(late, 0.0, everybody + free @ torch.from_numpy(z))
        if (worst := float((a @ self.matrix - 1).abs().max())) > RESIDUAL:
            raise ValueError(
                f"the cyclic code of {self.n} workers and s={self.s} is too large for float64, and leaves an error of "
                f"{worst:.1e}; take code: repetition or a smaller s"
            )
        return a

    def sum(self, answered: Tensor, rows: Tensor) -> Tensor:
        """[P]: the sum of all chunks' gradients, from the answers rows [n, P] of the workers answered [n] bool."""
        return self.decode(answered).to(rows) @ rows


@lru_cache(maxsize=8)
def _cyclic(n: int, s: int) -> Tensor:
    """B with the support i .. i + s (mod n) in row i, and H B' = 0 for a Gaussian H [s, n] with H 1 = 0."""
    if not s:
        return torch.eye(n, dtype=torch.float64)
    h = torch.from_numpy(server_rng(0, "gradient code").standard_normal((s, n)))
    h[:, -1] = -h[:, :-1].sum(1)
    rest = (torch.arange(n)[:, None] + torch.arange(1, s + 1)) % n  # [n, s]
    solved = torch.linalg.solve(h[:, rest].transpose(0, 1), h.T)
    return torch.eye(n, dtype=torch.float64).scatter(1, rest, -solved)


@lru_cache(maxsize=8)
def _solutions(n: int, s: int) -> tuple[Tensor, Tensor]:
    """(a_0 [n], free [n, s]): all a with a' B = 1' are a_0 + free z, a_0 the one of least norm and free orthonormal.

    So the a of least norm that is 0 for some workers follows from a system of their number.
    """
    u, sigma, v = torch.linalg.svd(_cyclic(n, s))
    rank = n - s
    least = u[:, :rank] @ ((v[:rank] @ torch.ones(n, dtype=torch.float64)) / sigma[:rank])
    return least, u[:, rank:]


@lru_cache(maxsize=8)
def _repetition(n: int, s: int) -> Tensor:
    block = torch.arange(n) // (s + 1)
    return (block[:, None] == block).double()
