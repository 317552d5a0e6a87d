"""Local steps of clients whose data are one function: every step uses it whole, and an epoch is one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fedsim.cohort import Cohort
from fedsim.task import Schedule


class OwnFunction:
    """The batches of such a stack.

    Args:
        cohort: the stack.
        schedule: its `steps`, or its `epochs` as steps; the batch size changes nothing.
        batch: step -> the task's own batch.
    """

    def __init__(self, cohort: Cohort, schedule: Schedule, batch: Callable[[int], Any]) -> None:
        steps = schedule.steps if schedule.steps is not None else schedule.epochs
        assert steps is not None
        self._num_clients, self._steps, self._batch = len(cohort), steps, batch
        self.num_steps = torch.full((len(cohort),), steps, dtype=torch.int64, device=cohort.ids.device)

    def __len__(self) -> int:
        return self._steps

    def active(self, step: int) -> int:
        return self._num_clients

    def __getitem__(self, step: int) -> Any:
        return self._batch(step)
