"""FedRep: its twin, that either half leaves the other's entries alone, and its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim.clients.local_training import LocalTraining
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedrep import FedRep
from fedsim.task import Schedule
from fedsim.tasks.models import mlp
from tests.build import Play, cohort, local_sgd, play
from tests.reference.personal import fedrep
from tests.strategies.personal import OWN, own_models, parted
from tests.strategies.tasks import images


def _fedrep(task: Any, local: LocalTraining | None = None, **fields: Any) -> FedRep:
    given = {"personal": ("head",), "head_epochs": 2, "layout": task.layout}
    return FedRep(**{**given, "local": local or local_sgd(task, 0.05, steps=3), **fields})


@pytest.mark.parametrize("size", [None, 2])
def test_equals_its_twin_on_noisy_quadratics(size: int | None) -> None:
    task, twin = parted(3)
    run = Play.start(task, _fedrep(task, cohort_size=size), width=2)
    path, models = fedrep(twin, task.x0, OWN, 8, eta=0.05, head_steps=2, size=size)
    torch.testing.assert_close(run.path(8), path, rtol=0, atol=1e-12)
    torch.testing.assert_close(own_models(run), models, rtol=0, atol=1e-12)


def test_equals_a_plain_loop_of_autograd_on_a_network() -> None:
    task, twin = images(mlp, [7, 20, 1, 0, 13, 9], None)
    local = local_sgd(task, 0.2, epochs=1, steps=None, batch_size=None)
    run = Play.start(task, _fedrep(task, local, personal=None, head_epochs=3), width=4)
    own = torch.zeros(task.layout.size, dtype=torch.bool)
    own[-2010:] = True
    path, models = fedrep(twin, task.x0, own, 3, eta=0.2, head_steps=3)
    torch.testing.assert_close(run.path(3), path, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(own_models(run), models, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "adamw", "lr": 0.1, "weight_decay": 0.1}, {"name": "sgd", "lr": 0.1, "momentum": 0.9}],
)
def test_a_half_moves_its_own_entries_only_whatever_the_rule(optimizer: dict[str, Any]) -> None:
    task, _ = parted(3)
    strategy = _fedrep(task, local_sgd(task, steps=3, optimizer=optimizer))
    for half, moves in ((strategy.head, OWN), (strategy.body, ~OWN)):
        delta = half(cohort(task, [0, 1]), task.x0).delta.dense()
        assert (delta[:, ~moves] == 0).all() and (delta[:, moves] != 0).all()


def test_without_entries_of_their_own_it_is_fedavg() -> None:
    task, _ = parted(3)
    ours = play(task, _fedrep(task, personal=(), cohort_size=3), 6)
    theirs = play(task, FedAvg(cohort_size=3, local=local_sgd(task, 0.05, steps=3)), 6)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_clock_counts_the_steps_of_both_halves() -> None:
    task, _ = parted(3)
    run = Play.start(task, _fedrep(task))
    run.step()
    assert run.fleet.now == pytest.approx(0.01 * (2 + 3))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head_epochs": 0}, "head_epochs must be at least 1"),
        ({"personal": ("heads",)}, "'heads' of .* matches no entry of the model; its entries are body, head, tail"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _fedrep(parted(1)[0], **fields)


def test_optimizers_that_cannot_train_two_halves_are_refused() -> None:
    task, _ = parted(1)
    kept = local_sgd(task, optimizer={"name": "adam", "lr": 0.1, "state_scope": "client"})
    with pytest.raises(ValueError, match="set local.optimizer.state_scope: round"):
        _fedrep(task, kept)
    foreign: Any = ForeignOptimizer(torch.optim.Rprop, {"lr": 0.1}, task.layout)
    with pytest.raises(ValueError, match="trains parts of the model in turn"):
        _fedrep(task, LocalTraining(optimizer=foreign, schedule=Schedule(epochs=1)))
