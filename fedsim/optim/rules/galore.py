"""GaLore: an elementwise rule on each matrix gradient's leading singular directions.

Letters: k clients, G matrices of one shape, l >= s their sides, r rank (at most s); M [l, s] a matrix turned tall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from fedsim.config import FromTable
from fedsim.optim.rule import Count, Decay, Named, Rule, Size, State
from fedsim.optim.rules.adaptive import Adam
from fedsim.optim.rules.matrix import groups_of, tall
from fedsim.optim.rules.subspace import LowRank, back, flat_of, like_parts, refresh_, sized, slots
from fedsim.optim.segments import Segments
from fedsim.streams import Streams

OVERSAMPLING = 8  # columns of a sketch beyond the rank


@dataclass(frozen=True, kw_only=True)
class GaLore(LowRank):
    """GaLore: every `gap` steps B = the leading right singular vectors of M; u = scale * inner(M B) B^T.

    Zhao et al. GaLore: memory-efficient LLM training by gradient low-rank projection. arXiv:2403.03507. The inner
    moments live on through a refresh and meet the new basis. Departure: signs are fixed (`leading_columns`), so no
    back end shows. With fewer local steps than `gap` a fresh state means one basis per client and round; `randomized`
    is the cheaper one. One basis from the mean gradient of many clients is left out: within a stack a client's numbers
    would depend on its neighbours, and no server sends one. A basis that all share is `dct_lowrank`'s.

    Args:
        rank: r; matrices with a shorter side keep all of it.
        basis: `svd`, or `randomized` (`sketched_columns`: nearly the same span, from products and QR of [l, r + 8]).
        gap: steps between two refreshes, the first of which is a client's first step.
        scale: of the direction.
        align: turn each new column so that it has a positive product with the old one in its place.
        inner: {name, ...} of the rule inside, by default `adamw_hf` (raw eps).
    """

    rank: Count = 128
    basis: Literal["svd", "randomized"] = "svd"
    gap: Count = 200
    scale: Size = 0.25
    align: bool = False
    inner: Annotated[Rule, FromTable("inner_rule", "adamw_hf")] = Adam(eps_mode="raw", eps=1e-6)

    decay: ClassVar[Decay] = "decoupled_after"
    default_lr: ClassVar[float | None] = 0.01

    def sized_states(self, seg: Segments) -> tuple[State, ...]:
        basis = State("basis", per=slots(seg, self.rank, "basis").sizes, code="exact")
        return (basis, *sized(self.inner.active_states(), slots(seg, self.rank, "low").sizes))

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        return {**self.inner.coefficients(t, lr, host), "refresh": (t - 1) % self.gap == 0, "scale": self.scale}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        bases = slots(seg, self.rank, "basis").views(s.basis)
        low = []
        for group, basis in zip(groups_of(seg), bases, strict=True):
            m = tall(group.take(g))
            refresh_(basis, c.refresh, self._basis, m, basis)
            low.append(m @ basis)
        flat = flat_of(low)
        u_low = self.inner.direction(flat, flat, s, c, seg) * c.scale
        return back(like_parts(u_low, low), bases, seg, g)

    def _basis(self, m: Tensor, old: Tensor) -> Tensor:
        new = COLUMNS[self.basis](m, self.rank)
        if not self.align:
            return new
        against = (old * new).sum(-2, keepdim=True) < 0
        return torch.where(against, -new, new)


def leading_columns(m: Tensor, rank: int) -> Tensor:
    """The r leading right singular vectors of m [..., l, s] as columns [..., s, r], the largest entry positive.

    Singular vectors are defined up to their sign; moments outlive a refresh, so the sign must not be the library's.
    """
    return _peaks_up(torch.linalg.svd(_finite(m), full_matrices=False).Vh[..., :rank, :].mT)


def sketched_columns(m: Tensor, rank: int) -> Tensor:
    """Nearly `leading_columns`, by a randomized range finder with one power iteration; exact up to rank r.

        Q = qr(M W),  V R = qr(M^T qr(M qr(M^T Q))),  columns = V U_r with U S Z^T = svd(R)

    Halko, Martinsson, Tropp. Finding structure with randomness. arXiv:0909.4061 (algorithms 4.4 and 5.1). All factors
    are l or s by r + 8, and the SVD is of [r + 8, r + 8]. W is normal and a function of its size alone: one sketch for
    all layers of that size, clients and refreshes, so neither the client's place nor the run shows in it.

    Args:
        m: [..., l, s] with l >= s; where s <= r + 8 nothing would be saved, and the SVD is taken.
        rank: r.
    """
    wide = min(rank, m.shape[-1]) + OVERSAMPLING
    if wide >= m.shape[-1]:
        return leading_columns(m, rank)
    m = _finite(m)
    q = torch.linalg.qr(m @ gaussian_sketch(m.shape[-1], wide, m.dtype, m.device)).Q
    q = torch.linalg.qr(m @ torch.linalg.qr(m.mT @ q).Q).Q
    v, r = torch.linalg.qr(m.mT @ q)
    return _peaks_up(v @ torch.linalg.svd(r).U[..., :rank])


def _finite(m: Tensor) -> Tensor:
    """m, zero where it is not finite, for which a decomposition would raise; no such client's step is kept."""
    return m.nan_to_num(0.0, 0.0, 0.0)


COLUMNS: dict[str, Callable[[Tensor, int], Tensor]] = {"svd": leading_columns, "randomized": sketched_columns}


@lru_cache(maxsize=64)
def gaussian_sketch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] standard normal, the same in every process and run."""
    one = torch.zeros(1, dtype=torch.int64)
    return Streams(0, one, one).normal("optimizer sketch", rows, columns, dtype=dtype)[0].to(device)


def _peaks_up(v: Tensor) -> Tensor:
    """Columns turned so that the entry largest in size is positive."""
    peak = v.gather(-2, v.abs().argmax(-2, keepdim=True))
    return torch.where(peak < 0, -v, v)
