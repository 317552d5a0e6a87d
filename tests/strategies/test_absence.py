"""Strategies among clients that are away, drop out or are late: schedules by hand, and what must still hold."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fedsim.aggregate import Mean
from fedsim.aggregate.coordinatewise import TrimmedMean
from fedsim.optim import build
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.availability import Bernoulli, Diurnal
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.centralised import Centralised
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedavg_m_vr import FedAvgMVR
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.fedbuff_stream import FedBuffStream
from fedsim.strategies.fedcm import FedCM
from fedsim.strategies.fedfix import FedFix
from fedsim.strategies.scaffold import Scaffold
from tests.build import Clocks, Play, drawn, local_sgd, quadratic

ETA, STEPS = 0.1, 3
A, B, N = [0.5, 1.0, 1.5, 2.0], [1.0, -1.0, 2.0, 3.0], [1, 2, 3, 4]


def _delta(client: int, x: float) -> float:
    """What a client of this quadratic changes by its local steps, in closed form."""
    return (1 - (1 - ETA * A[client]) ** STEPS) * (x - B[client])


def _task() -> Any:
    return quadratic(A, B, 5.0, num_examples=N)


def _local(task: Any) -> dict[str, Any]:
    return {"local": local_sgd(task, ETA, steps=STEPS)}


def _mean(changes: dict[int, float]) -> float:
    return sum(N[i] * d for i, d in changes.items()) / sum(N[i] for i in changes)


@pytest.mark.parametrize("kind", [FedCM, Centralised])
def test_the_server_steps_by_the_rate_that_clients_used_after_rounds_of_nobody(kind: Any) -> None:
    """Either is FedAvg here, whose server needs no rate."""
    task, absence = _task(), Absence(dropout=Dropout(probability=0.85))
    halved = {"name": "sgd", "lr": ETA, "schedule": {"name": "exponential", "gamma": 0.5}}
    local = local_sgd(task, optimizer=halved, steps=1)
    own: dict[str, Any] = {"alpha": 1.0, "aggregator": Mean()} if kind is FedCM else {}
    plays = [Play.start(task, s, absence=absence) for s in (kind(local=local, **own), FedAvg(local=local))]
    notes = [[play.step() for play in plays] for _ in range(12)]
    assert all(one == other for one, other in notes)
    assert ({"too_few": 1}, {}) in [(a, b) for (a, _), (b, _) in pairwise(notes)]
    assert float(plays[0].state.x) == pytest.approx(float(plays[1].state.x), abs=1e-12)


def test_fedavg_with_a_deadline_that_keeps_late_replies_follows_its_schedule_by_hand() -> None:
    """Jobs of 1, 2, 3 and 4 seconds, rounds of 2.5 at most: clients 2 and 3 answer in every second round."""
    task = _task()
    play = Play.start(task, FedAvg(deadline=2.5, late="keep", **_local(task)), devices=Clocks((1.0, 2.0, 3.0, 4.0)))
    x, expected, times = 5.0, [], []
    for now in (0.0, 4.5, 9.0):
        old, first = x, {i: _delta(i, x) for i in (0, 1)}
        x -= _mean(first)
        expected.append(x)
        x -= _mean({i: _delta(i, x) for i in (0, 1)} | {i: _delta(i, old) for i in (2, 3)})
        expected.append(x)
        times += [now + 2.5, now + 4.5]
    got, seen = [], []
    for _ in expected:
        got.append(float(play.path(1)[0]))
        seen.append((play.fleet.now, play.seen["num_clients"], play.seen["num_late"]))
    assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-12)
    assert seen == [(t, *((2, 2) if k % 2 == 0 else (4, 0))) for k, t in enumerate(times)]


def test_over_selection_takes_the_first_replies_and_ends_the_round_with_them() -> None:
    task = _task()
    strategy = FedAvg(cohort_size=2, over_select=2.0, **_local(task))
    play = Play.start(task, strategy, devices=Clocks((4.0, 1.0, 3.0, 2.0)))
    x = 5.0 - _mean({i: _delta(i, 5.0) for i in (1, 3)})
    assert float(play.path(1)[0]) == pytest.approx(x, abs=1e-12)
    assert (play.fleet.now, play.seen["num_clients"], play.seen["num_late"]) == (2.0, 2, 2)


@pytest.mark.parametrize(("over", "asked"), [(1.0, 3), (1.3, 4), (1.34, 5), (9.0, 10)])
def test_so_many_times_the_cohort_is_asked_rounded_up(over: float, asked: int) -> None:
    strategy = FedAvg(cohort_size=3, over_select=over, **_local(drawn(10, 2)))
    assert strategy.to_ask(10) == asked


class Never(Bernoulli):
    """Everybody leaves before anything is done."""

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        return torch.full((len(ids),), now, dtype=torch.float64)


DEATHS = Absence(availability=Never(p=1.0))


@pytest.mark.parametrize("kind", [FedAvg, Scaffold, FedAvgMVR])
def test_a_round_in_which_nobody_replied_changes_nothing_and_says_so(kind: Any) -> None:
    task = drawn(4, 3)
    momentum = build({"name": "sgd", "lr": 1.0, "momentum": 0.9}, task.layout)
    play = Play.start(task, kind(server_optimizer=momentum, **_local(task)))
    play.path(3)
    before, play.fleet.absence = play.state, DEATHS
    play.fleet.timing.absence = DEATHS
    assert play.step() == {"too_few": 1} and vars(play.state) == vars(before)
    assert (play.seen["num_clients"], play.seen["num_dropped"]) == (0, 4)


def test_a_robust_rule_sits_out_a_round_of_too_few_replies() -> None:
    task = drawn(6, 3)
    strategy = FedAvg(aggregator=TrimmedMean(f=2), **_local(task))
    play = Play.start(task, strategy, absence=Absence(dropout=Dropout(probability=0.4)))
    few = []
    for _ in range(30):
        before = play.state
        few.append(play.step() == {"too_few": 1})
        assert few[-1] == (play.seen["num_clients"] <= 4) == (play.state.x is before.x)
    assert 0 < sum(few) < 30


@pytest.mark.parametrize("late", ["drop", "keep"])
def test_scaffolds_c_stays_the_mean_of_all_c_i_whoever_is_late_or_drops_out(late: Any) -> None:
    task = drawn(6, 3, noise=0.3)
    absence = Absence(availability=Diurnal(period=7.0, share=0.7), dropout=Dropout(probability=0.2))
    strategy = Scaffold(cohort_size=3, over_select=1.5, late=late, **_local(task))
    play = Play.start(task, strategy, devices=Clocks((1.0, 0.9, 0.7, 0.5, 0.4, 0.3)), absence=absence)
    late_replies = 0
    for _ in range(25):
        play.step()
        late_replies += play.seen["num_clients"] > 3
        kept = play.fleet.memory.of(play.fleet.clients)["c"]
        assert_close(play.state.c, kept.mean(0), rtol=0, atol=1e-12)
    assert (late_replies > 0) == (late == "keep")


ASYNCHRONOUS = {
    "async_fedavg": lambda task: AsyncFedAvg(weights="identical", server_lr=0.3, **_local(task)),
    "fedfix": lambda task: FedFix(interval=0.5, **_local(task)),
    "fedbuff": lambda task: FedBuff(buffer_size=3, **_local(task)),
    "fedbuff_stream": lambda task: FedBuffStream(buffer_size=3, concurrency=4, **_local(task)),
}


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_asynchronous_servers_go_on_when_clients_come_and_go(name: str) -> None:
    """Clients agree on the solution; all are away at times, a third of the jobs dies, and still they get there."""
    task = quadratic([0.5, 0.8, 1.0, 1.2, 1.5, 2.0], [3.0] * 6, 0.0)
    absence = Absence(availability=Diurnal(period=4.0, share=0.6, spread=0.2), dropout=Dropout(probability=0.3))
    play = Play.start(task, ASYNCHRONOUS[name](task), devices=Clocks((1.0, 0.9, 0.7, 0.5, 0.4, 0.3)), absence=absence)
    dropped, away, times = 0, 0.0, []
    for _ in range(120):
        play.step()
        dropped, away = dropped + play.seen["num_dropped"], max(away, play.seen["num_away"])
        times.append(play.fleet.now)
    assert dropped > 20 and away > 0
    assert times == sorted(times) and times[-1] > 12.0
    assert float(play.state.x) == pytest.approx(3.0, abs=1e-2)
    assert play.fleet.num_at_work <= 6 and len(play.fleet.sent) <= play.fleet.num_at_work


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_a_client_that_comes_back_is_sent_work_again(name: str) -> None:
    task = quadratic([1.0] * 3, [0.0] * 3, 1.0)
    strategy = FedBuffStream(buffer_size=1, concurrency=3, **_local(task)) if name == "fedbuff_stream" else None
    strategy = strategy or ASYNCHRONOUS[name](task)
    play = Play.start(task, strategy, devices=Clocks((0.3,) * 3), absence=Absence(availability=Diurnal(period=2.0)))
    play.path(60)
    assert int(play.fleet.job_counts.min()) > 3


def test_what_can_not_be_late_is_refused() -> None:
    task = drawn(4, 3)
    for kwargs, words in (
        ({"late": "keep"}, "late: keep needs a deadline or over_select"),
        ({"over_select": 1.5}, "more than 1 needs a cohort_size"),
        ({"cohort_size": 2, "over_select": 0.5}, "over_select must be a number of at least 1"),
        ({"deadline": 0.0}, "deadline must be positive seconds"),
    ):
        with pytest.raises(ValueError, match=words):
            FedAvg(**kwargs, **_local(task))
    with pytest.raises(ValueError, match="late: keep does not go with this strategy: its momentum compares gradients"):
        FedAvgMVR(deadline=1.0, late="keep", **_local(task))
    adam = local_sgd(task, optimizer={"name": "adam", "lr": 0.1, "state_scope": "server"})
    with pytest.raises(ValueError, match="late: keep does not go with local.optimizer.state_scope: server"):
        FedAvg(deadline=1.0, late="keep", local=adam)
