"""Minibatch plans: every sample once an epoch, short last batches, uneven and empty clients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim.streams import Streams
from fedsim.task import Schedule
from fedsim.tasks.batches import BatchPlan

Plan = list[tuple[Tensor, Tensor | None]]


def _batches(counts: list[int], schedule: Schedule, streams: Streams) -> BatchPlan:
    """Batches that are the positions of their samples, with weights."""

    def gather(step: int | None, k: int, columns: slice, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return plan.rows[:k, columns], weights

    plan = BatchPlan(torch.tensor(counts), schedule, streams, gather)
    return plan


def _plan(counts: list[int], schedule: Schedule, clients: list[int] | None = None) -> Plan:
    ids = torch.tensor(clients if clients is not None else list(range(len(counts))))
    streams = Streams(0, ids, torch.zeros_like(ids))
    plan = _batches(counts, schedule, streams)
    return [plan[k] for k in range(len(plan))]


def _samples_of(plan: Plan, client: int, steps: slice) -> list[list[int]]:
    out = []
    for positions, weights in plan[steps]:
        if client < len(positions):
            row = positions[client].tolist()
            kept = [1.0] * len(row) if weights is None else weights[client].tolist()
            out.append([p for p, w in zip(row, kept, strict=True) if w == 1.0])
    return out


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_uses_every_sample_once_with_a_short_last_batch(shuffle: bool) -> None:
    plan = _plan([7, 3, 0], Schedule(epochs=2, batch_size=3, shuffle=shuffle))
    assert [len(p) for p, _ in plan] == [2, 2, 1, 1, 1, 1]
    first = _samples_of(plan, 0, slice(0, 6))
    assert [len(b) for b in first] == [3, 3, 1, 3, 3, 1]
    assert sorted(sum(first[:3], [])) == sorted(sum(first[3:], [])) == list(range(7))
    second = _samples_of(plan, 1, slice(0, 6))
    assert [sorted(b) for b in second] == [[0, 1, 2], [0, 1, 2]]
    if not shuffle:
        assert sum(first[:3], []) == list(range(7))


def test_a_given_number_of_steps_goes_on_into_the_next_epoch() -> None:
    plan = _plan([5, 2], Schedule(epochs=None, steps=4, batch_size=2))
    batches = _samples_of(plan, 0, slice(0, 4))
    assert [len(b) for b in batches] == [2, 2, 1, 2]
    assert sorted(sum(batches[:3], [])) == list(range(5))
    assert [sorted(b) for b in _samples_of(plan, 1, slice(0, 4))] == [[0, 1]] * 4


def test_a_batch_larger_than_every_client_is_cut_not_padded() -> None:
    plan = _plan([4, 4], Schedule(epochs=1, batch_size=100))
    assert len(plan) == 1 and plan[0][0].shape == (2, 4) and plan[0][1] is None


def test_full_batches_pad_smaller_clients_with_weight_zero() -> None:
    ((positions, weights),) = _plan([3, 1], Schedule(epochs=1, batch_size=None))
    assert positions.shape == (2, 3) and weights is not None
    assert weights.sum(1).tolist() == [3.0, 1.0]


def test_a_plan_does_not_depend_on_who_shares_the_stack() -> None:
    schedule = Schedule(epochs=3, batch_size=4)
    together = _plan([9, 6], schedule, [11, 5])
    alone = _plan([6], schedule, [5])
    assert _samples_of(together, 1, slice(None)) == _samples_of(alone, 0, slice(None))


def test_clients_without_samples_take_no_step() -> None:
    assert _plan([0, 0], Schedule(epochs=1, batch_size=4)) == []


@pytest.mark.parametrize(
    "bad", [{"epochs": 1, "steps": 2}, {"epochs": None}, {"epochs": 0}, {"batch_size": 0}], ids=str
)
def test_impossible_schedules_are_refused(bad: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match="epochs|batch_size"):
        Schedule(**bad)


def _given(counts: list[int], rows: list[list[int]], schedule: Schedule) -> BatchPlan:
    """A plan whose samples lie in given rows of the data set."""
    ids = torch.arange(len(counts))
    table = torch.tensor(rows)
    streams = Streams(0, ids, torch.zeros_like(ids))
    return BatchPlan(
        torch.tensor(counts), schedule, streams, lambda *given: None, lambda at: table.gather(1, at.clamp(max=3))
    )


def test_rows_that_lie_evenly_are_known_as_lines() -> None:
    fixed = Schedule(epochs=2, batch_size=2, shuffle=False)
    assert _given([4, 4, 4], [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]], fixed).lines == 2 * [(0, 10), (2, 10)]
    assert _given([4], [[7, 8, 9, 4]], fixed).lines == 2 * [(7, 0), None]
    uneven = _given([4, 4, 4], [[0, 1, 2, 3], [10, 11, 12, 13], [21, 22, 22, 23]], fixed)
    assert uneven.lines == 2 * [None, (2, 10)]
    backwards = _given([4, 4], [[10, 11, 12, 13], [0, 1, 2, 3]], fixed)
    assert backwards.lines == 4 * [None]


def test_a_padded_step_is_no_line_and_clients_that_are_done_do_not_matter() -> None:
    fixed = Schedule(epochs=1, batch_size=2, shuffle=False)
    plan = _given([4, 3, 2], [[0, 1, 2, 3], [4, 5, 6, 6], [8, 9, 9, 9]], fixed)
    assert plan.lines == [(0, 4), None]
    plan = _given([4, 2], [[0, 1, 2, 3], [5, 6, 6, 6]], fixed)
    assert plan.lines == [(0, 5), (2, 0)]


@pytest.mark.parametrize("cuts", [(0, 1, 4), (0, 3, 4, 7), (0, 10, 11, 12)])
def test_the_parts_of_clients_data_are_disjoint_and_together_all_of_it(cuts: tuple[int, ...]) -> None:
    counts = [13, 12, 7, 4, 1, 0]
    seen: list[list[int]] = [[] for _ in counts]
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        schedule = Schedule(epochs=1, batch_size=3, shuffle=False, part=(a, b, cuts[-1]))
        start, length = schedule.span(torch.tensor(counts))
        assert bool((length <= -(-torch.tensor(counts) * (b - a) // cuts[-1])).all())
        order = torch.argsort(length, descending=True, stable=True).tolist()
        plan = _plan([counts[i] for i in order], schedule, order)
        for row, i in enumerate(order):
            mine = sum(_samples_of(plan, row, slice(None)), [])
            assert mine == list(range(int(start[i]), int(start[i] + length[i])))
            seen[i] += mine
    assert seen == [list(range(n)) for n in counts]
