"""The results of stacks together again, whoever computed them.

Letters: R jobs, C clients of a stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.parts import Parts
from fedsim.sim.executor import ClientError, Results, Rows
from fedsim.sim.tree import TreeSum, add_


class Gather:
    """The results of stacks together again, whoever computed them.

    Args:
        num_jobs: R.
        work: the client half, of which all stacks must reply the same fields; "" for jobs of several kinds.
        num_groups: of stacks in the whole call, whose sums are joined along a tree.
        first: which of these groups comes first here.
    """

    def __init__(self, num_jobs: int, work: str = "", num_groups: int = 0, first: int = 0) -> None:
        self._work = work
        self.rows: Rows = {}  # what one client's row of each field looks like
        self._group, self._open = first, dict[str, Tensor]()  # which group is at hand, and its sums
        self._fields, self._memory, self._metrics = Parts(num_jobs), Parts(num_jobs), Parts(num_jobs)
        self._bits = torch.zeros(num_jobs, dtype=torch.int64)
        self.tree = TreeSum(num_groups)

    @property
    def results(self) -> Results:
        """What all groups of the call gave."""
        return replace(self.own, sums=self.tree.root)

    @property
    def own(self) -> Results:
        """What stands apart, without the sums."""
        return Results(self._fields, {}, self._memory, self._metrics, self._bits)

    def add(self, index: Tensor, part: Results) -> None:
        """Take the results of one stack (or of all stacks of a group), whose jobs were `index` [C] of the whole.

        Raises:
            ClientError: if it has not the fields of the other stacks.
        """
        self._check(part)
        add_(self._open, part.sums)
        self._fields.add(index, part.fields)
        self._memory.add(index, part.memory)
        self._metrics.add(index, part.metrics)
        self._bits[index] = part.bits_up

    def end_group(self) -> None:
        """Join the sums of the group at hand with those of its neighbours; the next group follows."""
        self.tree.add((0, self._group), self._open)
        self._group, self._open = self._group + 1, {}

    def _check(self, part: Results) -> None:
        if not self._work:
            return  # jobs of several kinds of work
        rows = {k: tuple(v.shape) for k, v in part.sums.items()} | {
            k: tuple(v.shape[1:]) for k, v in part.fields.items()
        }
        self.rows = self.rows or rows
        check_same_rows(self._work, self.rows, rows)


def check_same_rows(work: str, rows: Rows, other: Rows) -> None:
    """Refuse replies of two stacks that differ in their fields.

    Raises:
        ClientError: if they do.
    """
    if rows != other:
        raise ClientError(
            f"{work}: one stack replied {_named(rows)} and another {_named(other)}; every stack must "
            "reply the same fields, of one shape a client"
        )


def collect(gather: Gather, groups: Iterable[list[Tensor]], parts: Iterator[Results]) -> None:
    """Take the results of stacks, which come in their order, group by group."""
    for group in groups:
        for index in group:
            gather.add(index, next(parts))
        gather.end_group()


def _named(rows: Rows) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in rows.items()) or "nothing"
