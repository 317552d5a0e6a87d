"""Local steps of clients whose data are one function: every step uses it whole, and an epoch is one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fedsim.cohort import Cohort
from fedsim.task import Schedule


class OwnFunction:
    """The batches of such a stack, clients with examples first; those without take no step.

    Args:
        cohort: the stack.
        schedule: its `steps`, or its `epochs` as steps; the batch size changes nothing.
        batch: (step, number of clients) -> the task's own batch.
    """

    def __init__(self, cohort: Cohort, schedule: Schedule, batch: Callable[[int, int], Any]) -> None:
        has_data = cohort.task.num_examples.to(cohort.ids.device)[cohort.ids] > 0
        self._num_clients, self._batch = int(has_data.sum()), batch
        assert bool(has_data[: self._num_clients].all()), "a stack must be ordered by number of local steps"
        steps = schedule.steps if schedule.steps is not None else schedule.epochs
        self.num_steps = torch.where(has_data, steps, 0)

    def __len__(self) -> int:
        return int(self.num_steps[0]) if len(self.num_steps) else 0

    def active(self, step: int) -> int:
        return self._num_clients

    def __getitem__(self, step: int) -> Any:
        return self._batch(step, self._num_clients)
