"""Calls of the executor: from jobs in flight to jobs that run, and what they gave together again.

Letters: R jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.fleet import Work
from fedsim.graph import Inbox
from fedsim.memory import Memory
from fedsim.sim.events import Event, Sent
from fedsim.sim.executor import Executor, Jobs, Results
from fedsim.sim.gather import Gather

STACKS_AHEAD = 4  # of a CPU, so that its cores have full ones while the last of a call is computed; one fills a GPU


@dataclass
class Calls:
    """Where jobs run, and where their clients' rows are.

    Args:
        executor: runs client halves.
        memory: rows that clients keep.
    """

    executor: Executor
    memory: Memory

    def fresh(
        self,
        work: Work,
        ids: Tensor,
        numbers: Tensor,
        broadcast: Mapping[str, Any],
        round: int,
        inbox: Inbox | None = None,
    ) -> Jobs:
        """Jobs that all start from one broadcast, in this round."""
        which, rows = torch.zeros(len(ids), dtype=torch.int64), self.memory.of(ids)
        return Jobs(work.__name__, ids, numbers, [broadcast], which, rows, round=round, inbox=inbox)

    def of(self, events: Sequence[Event], sent: Mapping[int, Sent], round: int) -> Jobs:
        """Jobs in flight that do the same work, each from what it was sent."""
        keys = {key: i for i, key in enumerate(dict.fromkeys(e.sent for e in events))}
        ids, first = torch.tensor([e.client for e in events]), sent[events[0].sent]
        return Jobs(
            first.work,
            ids,
            torch.tensor([e.number for e in events]),
            [sent[key].broadcast for key in keys],
            torch.tensor([keys[e.sent] for e in events]),
            self.memory.of(ids),
            round=round,
            rounds=torch.tensor([sent[e.sent].round for e in events]),
        )

    def run(self, jobs: Jobs) -> Results:
        """What jobs gave; what they keep is written."""
        results = self.executor.run(jobs)
        self.memory.write(jobs.ids, results.memory)
        return results

    def together(self, calls: Sequence[Jobs], weights: Tensor | None) -> Results:
        """What several calls gave, one behind the other, or summed by weights [R] of all their jobs.

        Each starts from one broadcast, as client halves of strategies that only ever ask expect it.
        """
        calls = [jobs for jobs in calls if len(jobs.ids)]
        if len(calls) == 1:
            return self.run(replace(calls[0], weights=weights))
        gather, start = Gather(sum(len(jobs.ids) for jobs in calls), num_groups=len(calls)), 0
        for jobs in calls:
            rows = torch.arange(start, start := start + len(jobs.ids))
            gather.add(rows, self.run(jobs if weights is None else replace(jobs, weights=weights[rows])))
            gather.end_group()
        return gather.results


def of_those(which: Tensor, metrics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """{metric: [R]} of some jobs, `which` [R'] bool; of all of them as it is, in the parts that stacks gave."""
    return metrics if bool(which.all()) else {name: values[which] for name, values in metrics.items()}


def replies_ahead(width: int, stacks: int, device: torch.device) -> int:
    """How many replies of an asynchronous run may be computed before they are due: what a call's stacks hold."""
    return width * max(stacks, STACKS_AHEAD if device.type == "cpu" else 1)
