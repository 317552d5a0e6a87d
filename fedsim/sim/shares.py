"""One call divided among workers of a group: each runs neighbouring groups of stacks, then their sums are joined.

Letters: R jobs of the call, C clients of a stack, G groups, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.sim.collectives import Group, outlined
from fedsim.sim.executor import ClientError, Executor, Jobs, Results, Rows, StackRunner
from fedsim.sim.failure import Failure
from fedsim.sim.gather import Gather, check_same_rows, collect
from fedsim.sim.tree import Sums, shares

InOrder = Callable[[list[Tensor], Jobs], Iterator[Results]]


@dataclass
class Share:
    """What one worker has to do in a call.

    Args:
        jobs: its own, without models and without the vectors of their inbox, which are broadcast.
        sizes: of each of its stacks, group by group, in the order of its jobs.
        bounds: [W + 1] the first group of each worker.
        outlines: of what is broadcast: the models, then the vectors of the inbox.
    """

    jobs: Jobs
    sizes: list[list[int]]
    bounds: list[int]
    outlines: list[dict[str, Any]]

    def groups(self) -> list[list[Tensor]]:
        """Indices of the jobs of each stack, group by group."""
        stacks = iter(torch.arange(len(self.jobs.ids)).split([size for group in self.sizes for size in group]))
        return [[next(stacks) for _ in group] for group in self.sizes]


def broadcasts(jobs: Jobs) -> list[Mapping[str, Any]]:
    """What all workers of a call need: the models, then the vectors of the inbox."""
    return [*jobs.models, *([] if jobs.inbox is None else [jobs.inbox.fields])]


def share_out(jobs: Jobs, groups: list[list[Tensor]], costs: Tensor, num_workers: int) -> list[tuple[Tensor, Share]]:
    """Divide a call.

    Args:
        jobs: R of them.
        groups: G groups of stacks, as indices of jobs; one at least.
        costs: [R] what the jobs cost, in any unit.
        num_workers: W.

    Returns:
        [W] (indices of its jobs, share) of every worker.
    """
    bounds = shares([float(costs[torch.cat(group)].sum()) for group in groups], num_workers)
    outlines = [outlined(named) for named in broadcasts(jobs)]
    out = []
    for first, end in zip(bounds, bounds[1:], strict=False):
        index = torch.cat(
            [torch.zeros(0, dtype=torch.int64), *(stack for group in groups[first:end] for stack in group)]
        )
        inbox = None if jobs.inbox is None else replace(jobs.inbox.rows(index), fields={})
        part = replace(jobs.rows(index), models=[], which=jobs.which[index], inbox=inbox)
        out.append((index, Share(part, [[len(s) for s in group] for group in groups[first:end]], bounds, outlines)))
    return out


def run_share(
    share: Share, own: list[Mapping[str, Any]], runner: StackRunner, in_order: InOrder, group: Group
) -> Results | Failure | None:
    """Run a share while the others of the group run theirs.

    Args:
        share: what to do.
        own: what is broadcast, on worker 0.
        runner: what a client half is called.
        in_order: results of stacks in their order.
        group: the workers.

    Returns:
        What stands apart of the share's own jobs; on worker 0 with the sums over all jobs of the call. If some worker
        failed, its exception there and None elsewhere.

    Raises:
        Lost: if a worker is gone.
    """
    received = group.broadcast(share.outlines, own)
    inbox = None if share.jobs.inbox is None else replace(share.jobs.inbox, fields=dict(received.pop()))
    jobs = replace(share.jobs, models=received, inbox=inbox)
    work, groups, failure = runner.name_of(jobs.work), share.groups(), None
    gather = Gather(len(jobs.ids), work, share.bounds[-1], share.bounds[group.rank])
    try:
        collect(gather, groups, in_order([stack for stacks in groups for stack in stacks], jobs))
    except Exception as error:
        failure = Failure.of(error)
    said = group.agree(None if failure else gather.rows)
    if failure is None and None not in said:
        failure = _differing(work, said)
    if failure or None in said:
        return failure
    group.fold(gather.tree, share.bounds)
    return gather.results if group.rank == 0 else gather.own


@dataclass
class Pieces:
    """What one worker has to do of a task's own work.

    Args:
        work: name of the task's method.
        pieces: its own.
        outlines: of what all pieces get, which is broadcast.
    """

    work: str
    pieces: Sequence[Any]
    outlines: dict[str, Any]


def run_pieces(part: Pieces, own: list[Mapping[str, Any]], pool: Executor, group: Group) -> list[Any] | Failure:
    """Run some pieces while the others of the group run theirs.

    Args:
        part: what to do.
        own: what all pieces get, one broadcast, on worker 0.
        pool: workers of this process.
        group: the workers.

    Raises:
        Lost: if a worker is gone.
    """
    (shared,) = group.broadcast([part.outlines], own)
    try:
        return pool.map(getattr(pool.runner.task, part.work), part.pieces, **shared)
    except Exception as error:
        return Failure.of(error)


def check(outcomes: Sequence[Any]) -> None:
    """Raise what a worker raised, if one did."""
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            raise outcome.error from outcome.cause


def together(num_jobs: int, indices: Sequence[Tensor], outcomes: Sequence[Results | Failure | None]) -> Results:
    """What the workers of a call returned, in the jobs' order.

    Args:
        num_jobs: R.
        indices: [W] which jobs were whose.
        outcomes: [W] of `run_share`.

    Raises:
        ClientError: if a client half raised.
    """
    check(outcomes)
    gather, sums = Gather(num_jobs), Sums()
    for index, outcome in zip(indices, outcomes, strict=True):
        assert isinstance(outcome, Results), "a worker without a result of its own goes with one that failed"
        sums |= outcome.sums
        gather.add(index, replace(outcome, sums={}))
    return replace(gather.own, sums=sums)


def _differing(work: str, said: list[Rows]) -> Failure | None:
    """What is to be said if workers got different fields; one without stacks got none."""
    first, *others = [rows for rows in said if rows] or [{}]
    try:
        for rows in others:
            check_same_rows(work, first, rows)
    except ClientError as error:
        return Failure.of(error)
    return None
