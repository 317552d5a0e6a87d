"""Tasks with names in their vectors, and what clients of a played run would use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.memory import MemoryRows
from fedsim.params import Layout
from fedsim.streams import Streams
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Play
from tests.reference.clients import Formulas
from tests.strategies.tasks import noisy

OWN = torch.tensor([False, True, False])  # the entries of `parted`'s head


def parted(steps: int) -> tuple[QuadraticTask, Formulas]:
    """Noisy quadratics of three entries, of which the middle one is called head, and their twin."""
    task, twin = noisy(steps)
    task.layout = Layout.of({"body": (1,), "head": (1,), "tail": (1,)})
    return task, twin


def own_models(play: Play) -> Tensor:
    """[N, P]: the models that the clients of a played run would use."""
    fleet, runner = play.fleet, play.fleet.executor.inner.runner  # type: ignore[attr-defined]
    ids, cpu = fleet.clients, torch.device("cpu")
    rows = MemoryRows(dict(fleet.memory.of(ids)), len(ids), runner.task.layout.size, cpu)
    clients = Cohort(ids, runner.task, rows, Streams(play.seed, ids, fleet.job_counts[ids]), cpu, torch.zeros_like(ids))
    found: Any = play.strategy.personal_model(clients, play.state.x)
    return found
