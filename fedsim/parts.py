"""Rows of several jobs in the parts in which stacks gave them, so that nothing is copied until somebody needs it whole.

Letters: R jobs in all, C jobs of one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Parts(Mapping[str, Tensor]):
    """{name: [R, ...]}, put together when a name is asked for; zeros for jobs whose stack did not give that name.

    >>> parts = Parts(3)
    >>> parts.add(torch.tensor([2, 0]), {"c": torch.tensor([[1.0], [2.0]])})
    >>> parts.add(torch.tensor([1]), {"c": torch.tensor([[3.0]])})
    >>> parts["c"].tolist(), [job for job, _ in parts.rows()]
    ([[2.0], [3.0], [1.0]], [2, 0, 1])
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.pieces: list[tuple[Tensor, Mapping[str, Tensor]]] = []  # (which jobs [C], {name: [C, ...]})

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

    def rows(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(job, {name: its row}) of every job, as views."""
        for index, piece in self.pieces:
            for place, job in enumerate(index.tolist()):
                yield job, {name: value[place] for name, value in piece.items()}

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
