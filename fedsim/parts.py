"""Rows of several jobs in the parts in which stacks gave them, so that nothing is copied until somebody needs it whole.

Letters: R jobs in all, C jobs of one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Place = tuple[Mapping[str, Tensor], int]
"""Where a job's row lies: {name: [C, ...]} of its stack, and which of the C."""


@dataclass(eq=False)
class Parts(Mapping[str, Tensor]):
    """{name: [R, ...]}, put together when a name is asked for; zeros for jobs whose stack did not give that name.

    Args:
        num_rows: R.
        pieces: (which jobs [C], {name: [C, ...]}) of each part.

    >>> parts = Parts(3)
    >>> parts.add(torch.tensor([2, 0]), {"c": torch.tensor([[1.0], [2.0]])})
    >>> parts.add(torch.tensor([1]), {"c": torch.tensor([[3.0]])})
    >>> parts["c"].tolist()
    [[2.0], [3.0], [1.0]]
    >>> Parts.gathered(parts.places()[1:])["c"].tolist()
    [[3.0], [1.0]]
    """

    num_rows: int
    pieces: list[tuple[Tensor, Mapping[str, Tensor]]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Mapping[str, Tensor], num_rows: int) -> Parts:
        """{name: [R, ...]} as parts, if it is not that already."""
        if isinstance(rows, Parts):
            return rows
        parts = cls(num_rows)
        parts.add(torch.arange(num_rows), rows)
        return parts

    def add(self, index: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Take {name: [C, ...]} of the jobs `index` [C]; rows that are in parts themselves stay in them."""
        if isinstance(rows, Parts):
            self.pieces += [(index[of], piece) for of, piece in rows.pieces]
        elif rows:
            self.pieces.append((index, rows))

    def places(self) -> list[Place | None]:
        """[R] where each job's row lies; None for jobs that gave nothing."""
        out: list[Place | None] = [None] * self.num_rows
        for index, piece in self.pieces:
            for row, job in enumerate(index.tolist()):
                out[job] = piece, row
        return out

    @classmethod
    def gathered(cls, places: Sequence[Place | None]) -> Parts:
        """The inverse of `places`, for any jobs of any calls: one part for each stack that gave some of them."""
        stacks: dict[int, tuple[Mapping[str, Tensor], list[int], list[int]]] = {}
        for job, place in enumerate(places):
            if place is not None:
                _, jobs, rows = stacks.setdefault(id(place[0]), (place[0], [], []))
                jobs.append(job)
                rows.append(place[1])
        parts = cls(len(places))
        for piece, jobs, rows in stacks.values():
            parts.add(torch.tensor(jobs), {name: _taken(value, rows) for name, value in piece.items()})
        return parts

    def __getitem__(self, name: str) -> Tensor:
        given = [(index, piece[name]) for index, piece in self.pieces if name in piece]
        if not given:
            raise KeyError(name)
        (index, rows), *others = given
        if not others and torch.equal(index, torch.arange(self.num_rows)):
            return rows
        whole = sum(len(index) for index, _ in given) == self.num_rows
        make = torch.empty if whole else torch.zeros
        out = make((self.num_rows, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        for index, rows in given:
            out.index_copy_(0, index.to(out.device), rows)
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for _, piece in self.pieces for name in piece))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _taken(value: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a stack's tensor [C, ...]: itself if they are all of it, else a copy."""
    if rows == list(range(len(value))):
        return value
    if len(rows) == 1:
        return value[rows[0] : rows[0] + 1].clone()
    return value.index_select(0, torch.tensor(rows, device=value.device))
