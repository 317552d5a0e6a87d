"""A corrected run is the plain run with its corrections, whatever of it is formed."""

from __future__ import annotations

import pytest
import torch

from fedsim.clients.corrected import corrected_run
from fedsim.clients.direction import GRADIENT, Direction
from fedsim.tasks.models import mlp
from tests.build import cohort, digits_task, local_sgd
from tests.strategies.tasks import images

COUNTS = [20, 9, 4, 0]


@pytest.mark.parametrize("engine", ["stacked", "loop"])
@pytest.mark.parametrize("own_models", [False, True])
def test_the_change_folds_as_it_forms(engine: str, own_models: bool) -> None:
    task = digits_task(mlp, COUNTS, engine)
    clients = cohort(task, [0, 1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    c_i = 0.01 * torch.randn(4, len(task.x0), generator=generator)
    x = task.x0 + 0.01 * torch.randn(4, len(task.x0), generator=generator) if own_models else task.x0
    u = 0.5 * (GRADIENT - c_i) + 0.2 * task.x0
    run = local_sgd(task, epochs=1, steps=None, batch_size=6)(clients, x, u, mean_grad=True)
    mean, steps, change = run.mean_grad, run.steps[:, None], run.delta.dense()
    assert mean is not None
    torch.testing.assert_close(change, 0.1 * steps * (0.5 * (mean - c_i) + 0.2 * task.x0))
    assert change[3].abs().max() == 0 and mean[3].abs().max() == 0, "no data, no steps"
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    torch.testing.assert_close(run.delta.weighted_sum(weights), weights.float() @ change)


def test_the_model_received_is_left_alone() -> None:
    task, _ = images(mlp, COUNTS, 6)
    clients, x = cohort(task, [0, 1, 2, 3]), task.x0.clone()
    batches = task.batches(clients.ids, clients.streams, local_sgd(task, epochs=1, steps=None, batch_size=6).schedule)
    corrected_run(clients, x, batches, 0.1, Direction.of(GRADIENT + task.x0))
    assert torch.equal(x, task.x0)
