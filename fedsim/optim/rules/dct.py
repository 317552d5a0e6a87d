"""SVD-free low rank: an elementwise rule on each matrix gradient's heaviest cosine directions.

Letters: k clients, G matrices of one shape, l >= s their sides, r rank (at most s); M [l, s] a matrix turned tall.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from math import pi
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fedsim.config import FromTable
from fedsim.optim.rule import Count, Decay, Named, Rule, State
from fedsim.optim.rules.adaptive import Adam
from fedsim.optim.rules.matrix import groups_of, tall
from fedsim.optim.rules.subspace import LowRank, back, flat_of, like_parts, refresh_, sized, slots
from fedsim.optim.segments import Segments


@dataclass(frozen=True, kw_only=True)
class DctLowRank(LowRank):
    """DCT low rank: B = the r columns of the cosine basis Q [s, s] on which M weighs most; u = inner(M B) B^T.

    Modoranu et al. SVD-free low-rank adaptive gradient optimization. arXiv:2505.17967. A column's weight is the l1 norm
    of its column of M Q. Q is one matrix for all layers with that s and for all clients, so a client keeps r indices
    per matrix. Departures: one Q per s (the authors' file keeps one per model); rotation is by matching indices, which
    is what their product Q_old^T Q_new is without its rounding; ties go to what the library's top-k says; kept indices
    ascend. So without `rotate` a moment meets another column than in their file, which leaves the order of the kept
    columns, and with it which moment goes on with which, to what an unsorted top-k of the device returns.

    Args:
        rank: r; matrices with a shorter side keep all of it.
        gap: steps between two selections, besides the first step.
        rotate: at a selection, moments of columns that stay go with them and the others start at zero; otherwise
            moments stay in their places.
        error_feedback: what the columns left out is added to the next gradient (one more number per parameter).
        max_side: matrices with a side as long get the `other` rule.
        inner: {name, ...} of the rule inside, by default `adam`.
    """

    rank: Count = 128
    gap: Count = 1
    rotate: bool = False
    error_feedback: bool = False
    max_side: Count = 32_000
    inner: Annotated[Rule, FromTable("inner_rule", "adam")] = Adam()

    decay: ClassVar[Decay] = "decoupled"
    default_lr: ClassVar[float | None] = 1e-3
    default_weight_decay: ClassVar[float] = 0.01

    def acts_on(self, role: str, shape: tuple[int, ...]) -> bool:
        return role in self.roles and max(shape, default=0) < self.max_side

    def sized_states(self, seg: Segments) -> tuple[State, ...]:
        index = State("index", per=slots(seg, self.rank, "index").sizes, dtype="int32", code="exact")
        error = (State("error", code="exact"),) if self.error_feedback else ()
        return (index, *error, *sized(self.inner.active_states(), slots(seg, self.rank, "low").sizes))

    def coefficients(self, t: Any, lr: Any, host: Named) -> Mapping[str, Any]:
        refresh = (t == 1) | (t % self.gap == 0)
        return {**self.inner.coefficients(t, lr, host), "refresh": refresh}

    def direction(self, x: Tensor, g: Tensor, s: Named, c: Named, seg: Segments) -> Tensor:
        if self.error_feedback:
            g = g + s.error
        low, bases = [], []
        for place, (group, index) in enumerate(
            zip(groups_of(seg), slots(seg, self.rank, "index").views(s.index), strict=True)
        ):
            m, q = tall(group.take(g)), cosine_basis(group.short, g.dtype, g.device)
            old = index.clone() if self.rotate else index
            refresh_(index, c.refresh, partial(heaviest, basis=q, rank=self.rank), m)
            if self.rotate:
                self._rotate_(s, place, old, index, group.short, seg)
            basis = q[:, index.long()].movedim(0, -2)
            low.append(m @ basis)
            bases.append(basis)
        flat = flat_of(low)
        if self.error_feedback:
            s.error.copy_(g).sub_(back(low, bases, seg, g))
        return back(like_parts(self.inner.direction(flat, flat, s, c, seg), low), bases, seg, g)

    def _rotate_(self, s: Named, place: int, old: Tensor, new: Tensor, short: int, seg: Segments) -> None:
        """Each state's columns move to where their cosine went; those whose cosine is not kept any more are zero."""
        for state in self.inner.active_states():
            view = slots(seg, self.rank, "low").views(getattr(s, state.name))[place]
            full = view.new_zeros(*view.shape[:-1], short)
            full.scatter_(-1, old.long()[..., None, :].expand_as(view), view)
            view.copy_(full.gather(-1, new.long()[..., None, :].expand_as(view)))


@lru_cache(maxsize=64)
def cosine_basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Q [n, n], orthonormal: Q_ij = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n)), row 0 times sqrt(1 / 2)."""
    i = torch.arange(n, dtype=torch.float64)
    q = (2 / n) ** 0.5 * torch.cos(pi * i[:, None] * (2 * i + 1) / (2 * n))
    q[0] *= 0.5**0.5
    return q.to(device, dtype)


def heaviest(m: Tensor, basis: Tensor, rank: int) -> Tensor:
    """[..., r] the columns of m [..., l, s] @ basis [s, s] with the largest l1 norms, ascending."""
    weight = (m @ basis).abs().sum(-2)
    return weight.topk(min(rank, weight.shape[-1]), dim=-1, sorted=False).indices.sort(-1).values
