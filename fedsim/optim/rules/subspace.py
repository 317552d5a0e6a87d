"""What low-rank rules share: an elementwise rule inside, and where each matrix's share lies in a flat state.

A matrix gradient, turned tall as M [l, s], is seen through s x r orthonormal columns B: R = M B [l, r] is what the
inner rule works on, with states of that size, and its direction u comes back as u B^T. Vectors, embeddings and heads
get the `other` rule, by default the inner rule at the same rate.

Letters: k clients, G matrices of one shape, l >= s their sides, r rank (at most s), W all low-rank entries of a client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fedsim.optim.rule import Reach, Rule, RuleSettings, State
from fedsim.optim.rules.matrix import Group, groups_of, untall
from fedsim.optim.segments import Segments


class LowRank(Rule):
    """Base of the low-rank rules: they are for matrices, and all else gets the inner rule at the same rate."""

    inner: Rule
    reach: ClassVar[Reach] = "matrix"
    roles: ClassVar[tuple[str, ...]] = ("matrix",)

    def other(self, base: RuleSettings) -> tuple[Rule, RuleSettings]:
        return self.inner, base


def sized(states: tuple[State, ...], sizes: tuple[int, ...]) -> tuple[State, ...]:
    """The same states with these numbers of entries, one per tensor."""
    return tuple(replace(state, per=sizes) for state in states)


def refresh_(state: Tensor, flag: Tensor | bool, compute: Callable[..., Tensor], *sources: Tensor) -> None:
    """state = compute(*sources) in the rows of the clients whose flag is set; nothing is computed for the others.

    Args:
        state: [k, ...].
        flag: one for all clients, or [k, 1].
        compute: rows of the state from the same rows of the sources.
        sources: each [k, ...].
    """
    if isinstance(flag, Tensor):
        rows = flag[:, 0].nonzero()[:, 0]
        if len(rows):
            state[rows] = compute(*(source[rows] for source in sources)).to(state.dtype)
    elif flag:
        state.copy_(compute(*sources))


@dataclass(frozen=True)
class Slots:
    """Where each group's share lies in a flat state [k, width] of so many entries per matrix.

    Args:
        shapes: of one matrix's share, per group.
        groups: the groups, in the order of the state.
    """

    groups: tuple[Group, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each matrix, in the order of the state."""
        return tuple(
            int(torch.Size(shape).numel())
            for group, shape in zip(self.groups, self.shapes, strict=True)
            for _ in range(group.count)
        )

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views [k, G, *shape], one per group."""
        parts, at = [], 0
        for group, shape in zip(self.groups, self.shapes, strict=True):
            width = group.count * int(torch.Size(shape).numel())
            parts.append(flat.narrow(1, at, width).unflatten(1, (group.count, *shape)))
            at += width
        return parts


@lru_cache(maxsize=256)
def slots(seg: Segments, rank: int, kind: str) -> Slots:
    """The slots of `low` [l, r], `basis` [s, r] or `index` [r]."""
    groups = groups_of(seg)
    shape: Callable[[Group, int], tuple[int, ...]] = {
        "low": lambda group, r: (group.long, r),
        "basis": lambda group, r: (group.short, r),
        "index": lambda group, r: (r,),
    }[kind]
    return Slots(groups, tuple(shape(group, min(rank, group.short)) for group in groups))


def flat_of(parts: list[Tensor]) -> Tensor:
    """[k, W] from tensors [k, G, ...], one per group."""
    return torch.cat([part.flatten(1) for part in parts], 1)


def back(parts: list[Tensor], bases: Sequence[Tensor], seg: Segments, like: Tensor) -> Tensor:
    """[k, P] as `like`: each group's part B^T, from its parts [k, G, l, r] and columns B [k, G, s, r]."""
    u = torch.empty_like(like, memory_format=torch.contiguous_format)
    for group, part, basis in zip(groups_of(seg), parts, bases, strict=True):
        group.put_(u, untall(part @ basis.mT, group.shape))
    return u


def like_parts(flat: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """flat [k, W] cut as the parts were."""
    pieces = flat.split([part[0].numel() for part in parts], 1)
    return [piece.unflatten(1, part.shape[1:]) for piece, part in zip(pieces, parts, strict=True)]
