"""Clients that are away, jobs that die and replies that come too late, on schedules worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.checkpoint import load, save
from fedsim.cohort import Cohort
from fedsim.compress.sparsify import TopK
from fedsim.fleet import Cost, Held
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.devices import Constant, Exponential
from fedsim.sim.fleet import SimFleet
from fedsim.sim.links import Downlink
from fedsim.streams import Streams
from tests.build import Clocks, Counted, build_fleet, quadratic

X = torch.tensor([1.0, 2.0], dtype=torch.float64)
BITS, REPLY = 64, 96  # of x, and of what `plus` replies


class Halves:
    """Client halves whose replies are known."""

    def plus(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        """x plus the client's id."""
        assert x.ndim == 1, "all clients of a call start from one broadcast"
        return {"y": x + clients.ids[:, None], "round": clients.rounds.double()}

    def count(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        """How often the client has done this."""
        clients.memory["n"] = clients.memory["n"] + 1
        return {"n": clients.memory["n"]}


HALVES = Halves()


@dataclass(frozen=True)
class Hours:
    """Clients that are on line from one time to another, given by hand, and never else."""

    hours: tuple[tuple[float, float], ...]

    def on_line(self, seed: int, ids: Tensor, now: float) -> Tensor:
        return torch.tensor([self.hours[i][0] <= now < self.hours[i][1] for i in ids.tolist()], dtype=torch.bool)

    def changes(self, seed: int, ids: Tensor, now: float, before: float) -> Tensor:
        of = [self.hours[i] for i in ids.tolist()]
        return torch.tensor([a if now < a else b if now < b else inf for a, b in of], dtype=torch.float64)


def _fleet(tau: tuple[float, ...], hours: tuple[tuple[float, float], ...] | None = None, **options: Any) -> SimFleet:
    task = quadratic(torch.ones(len(tau), 2), torch.zeros(len(tau), 2), torch.zeros(2))
    if hours is not None:
        options["absence"] = Absence(availability=Hours(hours))
    return build_fleet(task, HALVES, **{"devices": Clocks(tau), **options})


def _ids(*clients: int) -> Tensor:
    return torch.tensor(clients, dtype=torch.int64)


def _computed(fleet: SimFleet) -> int:
    assert isinstance(fleet.executor, Counted)
    return sum(fleet.executor.calls)


def _seen(fleet: SimFleet) -> dict[str, float]:
    return dict(fleet.end_round().values())


# Availability ----------------------------------------------------------------------------------------------------


def test_those_on_line_and_idle_are_present_and_the_clock_moves_until_there_are_enough() -> None:
    fleet = _fleet((1.0, 1.0, 1.0), ((0.0, 5.0), (2.0, 9.0), (4.0, 9.0)))
    assert fleet.present().tolist() == [0] and fleet.now == 0.0
    assert fleet.present(at_least=2).tolist() == [0, 1] and fleet.now == 2.0
    assert fleet.present(at_least=3).tolist() == [0, 1, 2] and fleet.now == 4.0
    fleet.receive(until=9.5)
    assert fleet.present(at_least=0).tolist() == [] and fleet.now == 9.5
    with pytest.raises(ValueError, match="1 of 3 clients are needed at once from second 9.5 on, where 0 are on line"):
        fleet.present()
    assert _seen(fleet)["num_away"] == pytest.approx((2 + 1 + 0 + 3) / 4)


def test_a_server_does_not_wait_for_clients_while_jobs_are_in_flight() -> None:
    fleet = _fleet((3.0, 1.0), ((0.0, 9.0), (2.0, 9.0)))
    fleet.send(fleet.present(), HALVES.plus, x=X)
    assert fleet.present().tolist() == [] and fleet.now == 0.0 and fleet.num_at_work == 1
    assert fleet.receive().ids.tolist() == [0] and fleet.num_at_work == 0


def test_a_client_that_leaves_takes_its_job_along_and_one_that_ends_as_it_leaves_does_not() -> None:
    fleet = _fleet((2.0, 2.0, 1.0), ((0.0, 1.5), (0.0, 2.0), (0.0, 9.0)))
    fleet.send(fleet.clients, HALVES.count, x=X)
    r = fleet.receive()
    assert r.ids.tolist() == [2, 1] and fleet.now == 2.0 and _computed(fleet) == 2
    assert _seen(fleet) == {"staleness_mean": 0.0, "num_clients": 2, "num_dropped": 1}
    assert fleet.memory.of(_ids(0, 1, 2))["n"][:, 0].tolist() == [0, 1, 1], "who died keeps what it had"
    assert fleet.ledger.bits_down == 3 * BITS and fleet.ledger.bits_up == 2 * BITS


def test_who_is_off_line_is_sent_nothing() -> None:
    fleet = _fleet((1.0, 1.0), ((0.0, 9.0), (5.0, 9.0)))
    r = fleet.ask(fleet.clients, HALVES.plus, x=X)
    assert r.ids.tolist() == [0] and fleet.ledger.bits_down == BITS
    assert fleet.job_counts.tolist() == [1, 0] and _seen(fleet)["num_dropped"] == 1


# Dropout ---------------------------------------------------------------------------------------------------------


def _deaths(seed: int, clients: int, job: int = 0, probability: float = 0.5) -> dict[int, float]:
    """{client: share of its time at which its job dies}, from the streams that the fleet draws from."""
    ids = torch.arange(clients)
    u = Streams(seed, ids, torch.full_like(ids, job)).uniform("dropout", 2, dtype=torch.float64)
    return {i: float(u[i, 1]) for i in range(clients) if float(u[i, 0]) < probability}


DROPOUT = Absence(dropout=Dropout(probability=0.5))


def test_a_second_half_may_die_by_itself_and_is_counted_up_to_its_death() -> None:
    """The reply takes one second of the three, at whose end it is sent; the broadcast is held and is not sent again."""
    ids, seed = torch.arange(12), 4
    u = [Streams(0, ids, ids * 0).uniform("dropout", 2, step=half, dtype=torch.float64) for half in (0, 1)]
    begun = [i for i in range(12) if float(u[0][i, 0]) >= 0.5]
    lost = {i: float(u[1][i, 1]) for i in begun if float(u[1][i, 0]) < 0.5}
    assert 1 < len(lost) < len(begun) - 1, "the seed must give some of each"
    fleet = _fleet((2.0,) * 12, absence=DROPOUT, seed=seed, devices=Clocks((2.0,) * 12, uplink=BITS))
    first = fleet.ask(fleet.clients, HALVES.plus, cost=Cost(vectors_up=1), x=X)
    assert first.ids.tolist() == begun
    up, down, numbers = fleet.ledger.bits_up, fleet.ledger.bits_down, fleet.job_counts.clone()
    seen = _seen(fleet)
    second = fleet.ask(first.ids, HALVES.count, cost=Cost(vectors_up=1), x=Held(X))
    left = [i for i in begun if i not in lost]
    assert second.ids.tolist() == left and _seen(fleet)["num_dropped"] == len(lost)
    assert seen["num_dropped"] == 12 - len(begun)
    sent = sum(floor(BITS * max(3 * share - 2, 0.0) + 1e-9) for share in lost.values())
    assert fleet.ledger.bits_up - up == len(left) * BITS + sent and fleet.ledger.bits_down == down
    assert torch.equal(fleet.job_counts, numbers) and not fleet.sent and not len(fleet.queue)
    assert fleet.memory.of(ids)["n"][:, 0].tolist() == [float(i in left) for i in range(12)]
    assert fleet.present().tolist() == ids.tolist()


def test_a_job_that_dies_ends_at_its_share_and_leaves_nothing_behind() -> None:
    dead = _deaths(0, 6)
    assert 1 < len(dead) < 5, "the seed must give some of each"
    fleet = _fleet((2.0,) * 6, absence=DROPOUT, downlink=Downlink(compressor=TopK(fraction=0.5), seed=0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    first = min(dead.values())
    assert len(fleet.receive(until=2 * first + 1e-6)) == 0
    assert fleet.present().tolist() == [i for i, share in dead.items() if share == first], "it is idle at once"
    r = fleet.receive()
    assert r.ids.tolist() == [i for i in range(6) if i not in dead] and fleet.now == 2.0
    assert _computed(fleet) == 6 - len(dead) and _seen(fleet)["num_dropped"] == len(dead)
    assert not fleet.sent and not len(fleet.queue) and not bool(fleet._busy.any())
    assert fleet.ledger.bits_down == 6 * BITS and fleet.ledger.bits_up == (6 - len(dead)) * REPLY


def test_receiving_a_count_does_not_wait_for_the_dead() -> None:
    dead = _deaths(0, 6)
    fleet = _fleet((2.0,) * 6, absence=DROPOUT)
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert len(fleet.receive(count=6)) == 6 - len(dead) and fleet.now == 2.0
    assert len(fleet.receive(count=1)) == 0 and fleet.now == 2.0


def test_a_job_that_dies_while_it_sends_has_sent_its_share() -> None:
    """Four seconds down, one of work, four up: whoever dies at share s has sent (9 s - 5) / 4 of its reply."""
    dead = _deaths(0, 20)
    fleet = _fleet((1.0,) * 20, absence=DROPOUT, devices=Constant(seconds_per_step=1.0, downlink=16.0, uplink=16.0))
    r = fleet.ask(fleet.clients, HALVES.plus, cost=Cost(bits_up=BITS), x=X)
    assert fleet.now == 9.0 and len(r) == 20 - len(dead)
    lost = [int(BITS * max(0.0, (9 * share - 5) / 4)) for share in dead.values()]
    assert 0 < sum(lost) < BITS * len(dead)
    assert fleet.ledger.bits_up == sum(lost) + REPLY * len(r) and fleet.ledger.bits_down == 20 * BITS


def test_a_round_whose_last_client_dies_ends_when_it_dies() -> None:
    dead = _deaths(0, 6)
    (last, share), quick = max(dead.items(), key=lambda d: d[1]), 0.01
    fleet = _fleet(tuple(5.0 if i == last else quick for i in range(6)), absence=DROPOUT)
    assert len(fleet.ask(fleet.clients, HALVES.plus, fold=Mean(), x=X)) == 6 - len(dead)
    assert fleet.now == pytest.approx(5.0 * share)


# Late replies ----------------------------------------------------------------------------------------------------


def test_a_deadline_ends_a_round_and_late_replies_are_never_computed() -> None:
    fleet = _fleet((1.0, 3.0, 2.0))
    r = fleet.ask(fleet.clients, HALVES.plus, within=2.0, x=X)
    assert r.ids.tolist() == [0, 2] and fleet.now == 2.0 and _computed(fleet) == 2
    assert _seen(fleet) == {"num_clients": 2, "num_late": 1}
    assert fleet.ledger.bits_up == 2 * REPLY and fleet.ledger.bits_down == 3 * BITS
    assert fleet.present().tolist() == [0, 1, 2] and not fleet.sent
    assert len(fleet.ask(fleet.clients, HALVES.plus, within=9.0, x=X)) == 3 and fleet.now == 5.0, "all are there"


def test_the_first_replies_end_a_round_and_those_of_the_same_moment_count() -> None:
    fleet = _fleet((1.0, 3.0, 2.0, 2.0))
    assert fleet.ask(fleet.clients, HALVES.plus, first=2, x=X).ids.tolist() == [0, 2, 3] and fleet.now == 2.0
    assert fleet.ask(_ids(1), HALVES.plus, first=2, x=X).ids.tolist() == [1] and fleet.now == 5.0, "all there are"
    assert fleet.ask(fleet.clients, HALVES.plus, first=3, within=1.5, x=X).ids.tolist() == [0] and fleet.now == 6.5


def test_kept_replies_come_with_those_of_the_round_in_which_they_arrive() -> None:
    fleet = _fleet((1.0, 3.5, 2.0))
    assert fleet.ask(fleet.clients, HALVES.plus, within=1.0, late="keep", x=X).ids.tolist() == [0]
    assert _seen(fleet)["num_late"] == 2 and fleet.present().tolist() == [0] and fleet.num_at_work == 2
    r = fleet.ask(_ids(0), HALVES.plus, within=1.0, late="keep", x=10 * X)
    assert (r.ids.tolist(), r.staleness.tolist(), r.arrived_at.tolist()) == ([0, 2], [0, 1], [2.0, 2.0])
    assert r["y"].tolist() == [[10.0, 20.0], [3.0, 4.0]] and r["round"].tolist() == [1.0, 0.0]
    assert r.seconds.tolist() == [1.0, 2.0] and _seen(fleet)["staleness_mean"] == 0.5
    r = fleet.ask(_ids(0, 2), HALVES.count, within=9.0, late="keep", x=X)
    assert r.ids.tolist() == [0, 2] and fleet.now == 4.0, "replies of other work are no replies to this one"
    r = fleet.ask(_ids(), HALVES.plus, within=9.0, late="keep", x=X)
    assert r.ids.tolist() == [1] and fleet.now == 4.0 and not fleet.sent and not len(fleet.queue)


def test_kept_replies_are_folded_by_the_weights_of_all() -> None:
    for fold in (Mean(), None):
        fleet = _fleet((1.0, 3.0, 2.0))
        fleet.num_examples = torch.tensor([1, 5, 2])
        fleet.ask(fleet.clients, HALVES.plus, within=1.0, late="keep", fold=fold, x=X)
        r = fleet.ask(_ids(0), HALVES.plus, within=5.0, first=1, late="keep", fold=fold, x=10 * X)
        assert r.ids.tolist() == [0, 2] and fleet.now == 2.0
        by_hand = (1 * 10 * X + 2 * (X + 2)) / 3
        assert r["y"].ndim == (2 if fold is None else 1)
        torch.testing.assert_close(r.mean("y", Mean()), by_hand, rtol=0, atol=1e-14)


def test_where_nobody_can_be_asked_a_round_waits_for_the_next_kept_reply() -> None:
    fleet = _fleet((2.0, 3.0))
    assert len(fleet.ask(fleet.clients, HALVES.plus, within=2.0, first=1, late="keep", x=X)) == 1
    r = fleet.ask(fleet.present()[:0], HALVES.plus, within=0.5, late="keep", x=X)
    assert len(r) == 0 and fleet.now == 2.5
    assert fleet.ask(_ids(), HALVES.plus, late="keep", x=X).ids.tolist() == [1] and fleet.now == 3.0


def test_a_broadcast_to_nobody_is_no_message_that_others_missed() -> None:
    fleet = _fleet((2.0, 3.0), downlink=Downlink(compressor=TopK(fraction=0.5), seed=0))
    fleet.ask(fleet.clients, HALVES.plus, x=X)
    before = fleet.ledger.bits_down
    for missed in (2 * X, 3 * X):
        assert len(fleet.ask(fleet.clients[:0], HALVES.plus, x=missed)) == 0
    fleet.ask(fleet.clients, HALVES.plus, x=2 * X)
    assert fleet.ledger.bits_down == before + 2 * TopK(fraction=0.5).bits(2) < before + 2 * BITS


def test_a_kept_job_that_dies_holds_nobody_up() -> None:
    fleet = _fleet((2.0, 3.0), ((0.0, 2.0), (0.0, 2.5)))
    assert fleet.ask(fleet.clients, HALVES.plus, within=2.0, late="keep", x=X).ids.tolist() == [0]
    assert len(fleet.present()) == 0 and fleet.num_at_work == 1
    assert len(fleet.ask(_ids(), HALVES.plus, late="keep", x=X)) == 0 and fleet.now == 2.5
    assert fleet.num_at_work == 0 and not fleet.sent and _seen(fleet)["num_dropped"] == 1


def test_late_and_dead_jobs_survive_a_checkpoint(tmp_path: Path) -> None:
    def start() -> SimFleet:
        return _fleet((1.0, 20.0, 2.5, 3.0, 3.5, 3.7), absence=DROPOUT)

    def end(fleet: SimFleet) -> tuple[Any, ...]:
        r = fleet.ask(fleet.present(), HALVES.count, within=5.0, late="keep", fold=Mean(), x=X)
        return r.ids.tolist(), r["n"].tolist(), r.staleness.tolist(), fleet.now, fleet.ledger, _seen(fleet)

    one, two = start(), start()
    for fleet in (one, two):
        fleet.ask(fleet.clients, HALVES.count, within=1.5, late="keep", x=X)
        fleet.end_round()
    assert any(e.lost >= 0 for e in one.queue) and any(e.lost < 0 for e in one.queue)
    three = start()
    three.load(load(save(tmp_path, 1, {"fleet": two.state()})).take("fleet", three.state_classes))
    after = end(one)
    assert any(after[2]) and after == end(three)


# All of it at once ----------------------------------------------------------------------------------------------


@dataclass
class Diary:
    """What a fleet should say of its rounds, event by event: (end, replies or not, round, start) of who is at work."""

    tau: tuple[float, ...]
    hours: tuple[tuple[float, float], ...]
    deaths: tuple[dict[int, float], ...]
    now: float = 0.0
    round: int = 0

    def __post_init__(self) -> None:
        self.jobs, self.work = [0] * len(self.tau), dict[int, tuple[float, bool, int, float]]()

    def present(self) -> list[int]:
        there = [i for i, (a, b) in enumerate(self.hours) if i not in self.work and a <= self.now < b]
        if there or self.work:
            return there
        self.now = min(a for a, _ in self.hours if a > self.now)
        return [i for i, (a, b) in enumerate(self.hours) if a <= self.now < b]

    def ask(self, ids: list[int], first: int | None, within: float, late: str) -> tuple[Any, ...]:
        start, ends = self.now, dict[int, tuple[float, bool]]()
        for i in ids:
            share = self.deaths[self.jobs[i]].get(i)
            self.jobs[i] += 1
            end, death = start + self.tau[i], start + self.tau[i] * (inf if share is None else share)
            death = min(death, self.hours[i][1])
            ends[i] = (death, False) if death < end else (end, True)
        well = sorted(at for at, replies in ends.values() if replies)
        close = (
            well[first - 1]
            if first is not None and len(well) >= first
            else max((e for e, _ in ends.values()), default=inf)
        )
        if not ids:
            close = min((job[0] for job in self.work.values()), default=start)
        self.now = close = min(close, start + within)
        came = [(i, 0, self.tau[i]) for i in ids if ends[i][1] and ends[i][0] <= close]
        dropped = sum(not replies and at <= close for at, replies in ends.values())
        over = {i: job for i, job in self.work.items() if job[0] <= close}
        ended = sorted(over.items(), key=lambda item: (item[1][2], item[1][0]))
        came += [(i, self.round - sent, at - begun) for i, (at, replies, sent, begun) in ended if replies]
        dropped += sum(not job[1] for job in over.values())
        self.work = {i: job for i, job in self.work.items() if i not in over}
        late_ones = [i for i in ids if ends[i][0] > close]
        if late == "keep":
            self.work |= {i: (*ends[i], self.round, start) for i in late_ones}
        self.round += 1
        return came, dropped, len(late_ones), close


@pytest.mark.parametrize("late", ["drop", "keep"])
@pytest.mark.parametrize("seed", range(6))
def test_rounds_are_those_of_a_diary_kept_by_hand(seed: int, late: Any) -> None:
    """Over-selection, a deadline, late replies, dropout and hours, all together; saved and loaded half way."""
    rng = np.random.default_rng(seed)
    tau = tuple(np.round(0.5 + 4 * rng.random(9), 3).tolist())
    hours = tuple((round(6 * rng.random(), 3), round(25 + 60 * rng.random(), 3)) for _ in tau)
    absence = Absence(availability=Hours(hours), dropout=Dropout(probability=0.3))
    diary = Diary(tau, hours, tuple(_deaths(0, len(tau), job, 0.3) for job in range(200)))
    fleet, seen = _fleet(tau, absence=absence), set[str]()
    for k in range(12):
        if k == 6:
            state, fleet = fleet.state(), _fleet(tau, absence=absence)
            fleet.load(state)
        there = fleet.present().tolist()
        assert there == diary.present() and fleet.now == pytest.approx(diary.now)
        ids = sorted(rng.permutation(there)[:5].tolist())
        first, within = (3, inf) if k % 3 == 0 else (None, 2.5) if k % 3 == 1 else (2, 3.5)
        came, dropped, num_late, now = diary.ask(ids, first, within, late)
        r = fleet.ask(_ids(*ids), HALVES.plus, first=first, within=within, late=late, x=X)
        assert r.ids.tolist() == [i for i, _, _ in came] and r.staleness.tolist() == [s for _, s, _ in came]
        assert r.seconds.tolist() == pytest.approx([s for _, _, s in came]) and fleet.now == pytest.approx(now)
        row = _seen(fleet)
        assert (row["num_clients"], row["num_dropped"], row["num_late"]) == (len(came), dropped, num_late)
        seen |= {
            name
            for name, many in (("late", num_late), ("dropped", dropped), ("kept", any(s for _, s, _ in came)))
            if many
        }
        assert fleet.num_at_work == len(diary.work)
    assert seen >= {"late", "dropped"} and (late == "drop" or "kept" in seen)


# Deadlines nobody can meet ---------------------------------------------------------------------------------------


def test_a_deadline_that_nobody_can_meet_is_refused_once_nobody_has() -> None:
    fleet = _fleet((3.0, 2.0))
    with pytest.raises(
        ValueError, match=r"deadline=1.5 seconds is less than any client with data .* the fastest 2; raise"
    ):
        fleet.ask(fleet.clients, HALVES.plus, within=1.5, x=X)
    unlucky = _fleet((1.0, 1.0), devices=Exponential(mean=1.0, count=2))
    replies = [len(unlucky.ask(unlucky.clients, HALVES.plus, within=0.3, x=X)) for _ in range(30)]
    assert 0 in replies and max(replies) > 0, "who has bad luck tries again"
