"""The same small tasks for the simulator and for the plain twins."""

from __future__ import annotations

import torch

from fedsim.tasks.models import Factory
from fedsim.tasks.quadratic import QuadraticTask
from fedsim.tasks.supervised import SupervisedTask
from tests.build import digits_task, quadratic
from tests.reference.clients import Formulas, Modules


def noisy(steps: int, clients: int = 5, dim: int = 3) -> tuple[QuadraticTask, Formulas]:
    """Quadratics with matrices and noisy gradients, and their twin."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(clients, dim, dim, generator=generator, dtype=torch.float64)
    a = root @ root.transpose(1, 2) / dim + 0.5 * torch.eye(dim, dtype=torch.float64)
    b = torch.randn(clients, dim, generator=generator, dtype=torch.float64)
    return quadratic(a, b, torch.ones(dim), noise=0.3), Formulas(a, b, steps, noise=0.3)


def images(
    model: Factory, counts: list[int], batch_size: int | None, *, epochs: int = 1, steps: int | None = None
) -> tuple[SupervisedTask, Modules]:
    """A model on handwritten digits, and its twin."""
    task = digits_task(model, counts)
    data, ends = task.data, task.data.offsets.tolist()
    rows = [data.order[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    inputs, targets = [data.inputs[r] for r in rows], [data.targets[r] for r in rows]
    return task, Modules(task.module, inputs, targets, batch_size, epochs=epochs, steps=steps)
