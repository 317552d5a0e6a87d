"""Classification: which samples a step sees, what evaluation measures, and clients of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim.clients.byzantine import Backdoor
from fedsim.clients.oracle import full_gradient, gradient
from fedsim.engine.stacked import StackedEngine
from fedsim.sim.executor import StackRunner
from fedsim.sim.in_process import InProcess
from fedsim.streams import Streams
from fedsim.task import Schedule
from fedsim.tasks.models import logistic, mlp
from fedsim.tasks.supervised import SupervisedTask
from tests.build import cohort, digits_task
from tests.strategies.tasks import images

COUNTS = [30, 7, 0, 1]


def _pool(workers: int = 1) -> Any:
    return InProcess(StackRunner(digits_task(logistic, [1]), None, 0, torch.device("cpu")), width=1, workers=workers)


def test_batches_hold_the_clients_own_samples_in_the_keyed_order() -> None:
    task, twin = images(logistic, COUNTS, 8, epochs=2)
    clients = cohort(task, [0, 1, 3, 2], jobs=[5] * 4)
    batches = task.batches(clients.ids, clients.streams, Schedule(epochs=2, batch_size=8))
    assert batches.num_steps.tolist() == [8, 2, 2, 0]
    for step in range(len(batches)):
        batch = batches[step]
        for row in range(batches.active(step)):
            client = [0, 1, 3][row]
            order = Streams(0, torch.tensor([client]), torch.tensor([5])).permutation(
                "batches", torch.tensor([COUNTS[client]]), step=step // twin.batches_in_an_epoch(client)
            )[0]
            at = 8 * (step % twin.batches_in_an_epoch(client))
            mine = order[at : at + 8]
            size = int(task.oracle(batch, clients.ids).batch_sizes()[row])
            assert size == len(mine)
            assert torch.equal(batch.inputs[row, :size], twin.inputs[client][mine])
            assert torch.equal(batch.targets[row, :size], twin.targets[client][mine])


class Shifted(nn.Module):
    """Adds one to its inputs where they lie."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += 1
        return x


FIRST = {"pure": nn.Tanh(), "layer": nn.Hardtanh(-0.5, 0.5, inplace=True), "sum": Shifted()}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("counts", [[8, 8, 8], [9, 7, 3]])
def test_a_fixed_order_reads_the_data_where_it_lies_unless_the_module_writes_there(
    counts: list[int], first: str
) -> None:
    def make(shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), FIRST[first], nn.Linear(64, 5), nn.ReLU(inplace=True), nn.Linear(5, classes))

    task, twin = images(make, counts, 4)
    before, held_out = task.data.inputs.clone(), task.data.test_inputs.clone()
    clients = cohort(task, [0, 1, 2])
    batches = task.batches(clients.ids, clients.streams, Schedule(epochs=1, batch_size=4, shuffle=False))
    for step in range(len(batches)):
        batch = batches[step]
        lies = batch.inputs.untyped_storage().data_ptr() == task.data.inputs.untyped_storage().data_ptr()
        assert lies == (first == "pure" and (counts[0] == counts[2] or batches.active(step) == 1))
        for row in range(batches.active(step)):
            mine = twin.inputs[row][4 * step : 4 * step + 4]
            assert torch.equal(batch.inputs[row, : len(mine)], mine)
            assert torch.equal(batch.targets[row, : len(mine)], twin.targets[row][4 * step : 4 * step + 4])
        task.field(task.x0.repeat(len(batch.inputs), 1), batch)
    task.evaluate(task.x0, _pool())
    assert torch.equal(task.data.inputs, before) and torch.equal(task.data.test_inputs, held_out)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_full_gradient_is_that_of_autograd_over_all_samples(chunked: bool) -> None:
    counts = [1100, 30, 0] if chunked else [30, 7, 0]  # more than the 512 of a piece, or fewer
    task, twin = images(mlp, counts, None)
    stack = torch.stack([task.x0, 0.5 * task.x0, task.x0])
    got = full_gradient(cohort(task, [0, 1, 2]), stack)
    expected = torch.stack([twin.full(i, stack[i]) for i in range(3)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_at_two_points_uses_one_minibatch_and_the_step_says_which() -> None:
    task, twin = images(mlp, [30, 7, 0], 8)
    clients = cohort(task, [0, 1, 2], jobs=[3] * 3)
    for step in (0, 2):
        at_x, at_half = gradient(clients, task.x0, 0.5 * task.x0, batch_size=8, step=step)
        for i in (0, 1):
            torch.testing.assert_close(at_x[i], twin.gradient(i, task.x0, 3, step), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(at_half[i], twin.gradient(i, 0.5 * task.x0, 3, step), rtol=1e-4, atol=1e-6)
        assert float(at_x[2].abs().max()) == 0


def test_evaluation_is_the_mean_over_held_out_samples() -> None:
    task, twin = images(mlp, COUNTS, 8)
    torch.nn.utils.vector_to_parameters(task.x0, twin.module.parameters())
    with torch.no_grad():
        logits = twin.module(task.data.test_inputs)
    found = task.evaluate(task.x0, _pool())
    assert found["test_loss"] == pytest.approx(float(F.cross_entropy(logits, task.data.test_targets)), rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(float((logits.argmax(1) == task.data.test_targets).float().mean()))


def test_every_client_is_measured_on_its_own_samples_and_one_without_has_none() -> None:
    task, twin = images(mlp, COUNTS, 8)
    torch.nn.utils.vector_to_parameters(task.x0, twin.module.parameters())
    found = task.evaluate_clients(task.x0, _pool())
    for i in (0, 1, 3):
        with torch.no_grad():
            logits = twin.module(twin.inputs[i])
        assert float(found["loss"][i]) == pytest.approx(float(F.cross_entropy(logits, twin.targets[i])), rel=1e-5)
        hits = (logits.argmax(1) == twin.targets[i]).double().mean()
        assert float(found["accuracy"][i]) == pytest.approx(float(hits))
    assert bool(found["loss"][2].isnan()) and bool(found["accuracy"][2].isnan())


def test_evaluation_does_not_depend_on_the_number_of_workers() -> None:
    task = digits_task(mlp, [1300, 100])
    one, two = (task.evaluate_clients(task.x0, _pool(workers)) for workers in (1, 2))
    assert torch.equal(one["loss"], two["loss"]) and torch.equal(one["accuracy"], two["accuracy"])


def test_without_held_out_samples_there_is_nothing_to_report() -> None:
    task = digits_task(mlp, COUNTS)
    data = task.data.__class__(
        **{**task.data.__dict__, "test_inputs": task.data.inputs[:0], "test_targets": task.data.targets[:0]}
    )
    empty = SupervisedTask(data, task.module, task.x0, task.engine, task.sample_loss)
    assert empty.evaluate(task.x0, _pool()) == {}


def test_poison_changes_samples_of_the_chosen_clients_only_and_always_the_same() -> None:
    task, twin = images(logistic, [5, 40], None)
    before = task.data.inputs.clone()
    task.poison(torch.tensor([1]), Backdoor(target=3, share=0.5))
    clients, taken = cohort(task, [0, 1]), []
    for shuffle in (False, True):
        batch = task.batches(clients.ids, clients.streams, Schedule(epochs=1, batch_size=None, shuffle=shuffle))[0]
        honest = batch.inputs[0, :5].flatten(1).sum(1).sort().values
        torch.testing.assert_close(honest, twin.inputs[0].flatten(1).sum(1).sort().values)
        changed = (batch.inputs[1, :, 0, -3:, -3:] == 1.0).flatten(1).all(1)
        assert bool((batch.targets[1][changed] == 3).all())
        taken.append(batch.inputs[1][changed].flatten(1).sum(1).sort().values)
    torch.testing.assert_close(taken[0], taken[1])  # the same samples in another order
    assert 8 < len(taken[0]) < 32 and torch.equal(task.data.inputs, before)


def test_an_attacks_success_is_the_share_of_other_classes_that_get_the_wanted_label() -> None:
    task = digits_task(logistic, COUNTS)
    task.poison(torch.tensor([1]), Backdoor(target=3))
    shown = task.data.test_inputs.clone()
    shown[:, :, -3:, -3:] = 1.0
    x = torch.randn(task.x0.shape, generator=torch.Generator().manual_seed(0))
    guess = (shown.flatten(1) @ x[:640].view(10, 64).T + x[640:]).argmax(1)
    others = task.data.test_targets != 3
    assert task.evaluate(x, _pool())["test_attack_success"] == float((guess[others] == 3).double().mean()) > 0


def test_a_model_and_its_engine_take_the_room_of_one_vector() -> None:
    task = digits_task(logistic, [1, 2])
    engine = task.engine
    assert isinstance(engine, StackedEngine)
    programs = engine.module, engine.loop.modules.get(False), engine.vmapped.modules.get(True)
    for module in (task.module, *programs):
        assert all(p.untyped_storage().data_ptr() == task.x0.data_ptr() for p in module.parameters())
    assert task.init(0).data_ptr() != task.x0.data_ptr()
    before = task.x0.clone()
    task.field(
        torch.zeros(1, task.layout.size),
        task.batches(torch.tensor([1]), Streams(0, *torch.tensor([[1], [0]])), Schedule(epochs=None, steps=1))[0],
    )
    assert torch.equal(task.x0, before) and torch.equal(
        task.layout.flatten(dict(task.module.named_parameters())), before
    )
