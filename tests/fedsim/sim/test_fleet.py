"""The simulated fleet: when replies arrive, when they are computed, what they cost, and what survives a stop."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.aggregate import Mean
from fedsim.aggregate.coordinatewise import Median
from fedsim.checkpoint import load, save
from fedsim.cohort import Cohort
from fedsim.compress.quantize import Natural
from fedsim.compress.sparsify import TopK
from fedsim.fleet import Cost, Held
from fedsim.graph import Inbox
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.devices import Constant, LogNormal
from fedsim.sim.executor import ClientError
from fedsim.sim.fleet import SimFleet
from fedsim.sim.links import Downlink
from fedsim.tasks.quadratic import QuadraticTask
from tests.build import Clocks, Counted, build_fleet, heard_sum, quadratic
from tests.reference.clients import stream

X = torch.tensor([1.0, 2.0], dtype=torch.float64)


class Halves:
    """Client halves whose replies are known."""

    def plus(self, clients: Cohort, x: Tensor, rate: float = 0.0) -> dict[str, Tensor]:
        """x plus the client's id."""
        return {"y": x + clients.ids[:, None]}

    def count(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        """How often the client has done this."""
        clients.memory["n"] = clients.memory["n"] + 1
        return {"n": clients.memory["n"]}

    def draw(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        """A random number of the job."""
        return {"u": clients.streams.uniform("test", 1, dtype=torch.float64)}

    def log(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        clients.log(seen=clients.ids.double())
        return {"y": x.expand(len(clients), -1)}

    def numbers(self, clients: Cohort, x: Tensor, flag: bool, rate: float, none: None) -> dict[str, Tensor]:
        return {"a": torch.zeros(len(clients), 2), "b": torch.zeros(len(clients))}

    def fail(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("out of luck")

    def gather(self, clients: Cohort, inbox: Inbox, scale: float) -> dict[str, Tensor]:
        """The sum of what was heard, and the client's own vector."""
        return {"sum": scale * heard_sum(inbox, "y"), "own": inbox.own("y")}


HALVES = Halves()


def _task(n: int, samples: list[int] | None = None) -> QuadraticTask:
    return quadratic(torch.ones(n, 2), torch.zeros(n, 2), torch.zeros(2), num_examples=samples)


def _fleet(tau: tuple[float, ...], samples: list[int] | None = None, **options: Any) -> SimFleet:
    options.setdefault("devices", Clocks(tau))
    return build_fleet(_task(len(tau), samples), HALVES, **options)


def _waiting(fleet: SimFleet) -> list[int]:
    """Clients whose replies are computed and not due yet."""
    return [e.client for e in fleet.queue if e.result is not None]


def _reloaded(fleet: SimFleet, other: SimFleet, folder: Path) -> SimFleet:
    """The other fleet in the state of the first, which went through a checkpoint."""
    other.load(load(save(folder, 1, {"fleet": fleet.state()})).take("fleet", other.state_classes))
    return other


def _ids(*clients: int) -> Tensor:
    return torch.tensor(clients, dtype=torch.int64)


def _calls(fleet: SimFleet) -> list[int]:
    assert isinstance(fleet.executor, Counted)
    return fleet.executor.calls


def test_clients_that_are_sent_the_very_same_one_by_one_share_it_until_it_changes() -> None:
    fleet = _fleet((3.0, 2.0, 1.0, 4.0))
    for client, x in enumerate((X, X.clone(), X, X + 1)):
        fleet.send(_ids(client), HALVES.plus, x=x)
    assert sorted(sent.open for sent in fleet.sent.values()) == [1, 3]
    fleet.round = 1
    assert fleet.receive()["y"].tolist() == [[3.0, 4.0], [2.0, 3.0], [1.0, 2.0], [5.0, 6.0]]
    assert not fleet.sent, "nobody is working on it any more"
    for client in (2, 0):
        fleet.send(_ids(client), HALVES.plus, x=X)
        fleet.round += 1
    assert [sent.round for sent in fleet.sent.values()] == [1, 2], "a later step is another message"


def test_clients_booked_one_by_one_take_as_long_as_together() -> None:
    devices = LogNormal(median=0.1, sigma=0.7, uplink=50.0)
    together, alone = (build_fleet(_task(3, [1, 5, 9]), HALVES, devices=devices) for _ in range(2))
    cost = Cost(steps=lambda num_examples: num_examples)
    for _ in range(2):
        together.send(together.clients, HALVES.plus, cost=cost, x=X)
        for client in range(3):
            alone.send(_ids(client), HALVES.plus, cost=cost, x=X)
        assert torch.equal(alone.receive().arrived_at, together.receive().arrived_at)
    together.send(_ids(1), HALVES.plus, cost=Cost(steps=2), x=X)
    alone.send(_ids(1, 0), HALVES.plus, cost=Cost(steps=2), x=X)
    arrived = alone.receive()
    assert float(together.receive().arrived_at) == float(arrived.arrived_at[arrived.ids == 1]), "other work, other time"


def test_a_job_takes_download_work_and_upload() -> None:
    fleet = build_fleet(_task(2), HALVES, devices=Constant(seconds_per_step=0.5, downlink=64.0, uplink=16.0))
    r = fleet.ask(_ids(0, 1), HALVES.plus, cost=Cost(steps=3), x=X)
    assert fleet.now == pytest.approx(64 / 64 + 3 * 0.5 + 64 / 16)
    assert r.arrived_at.tolist() == pytest.approx([fleet.now] * 2)


def test_a_cost_given_in_bits_drives_the_clock() -> None:
    fleet = build_fleet(_task(1), HALVES, devices=Constant(seconds_per_step=0.0, uplink=10.0))
    fleet.ask(_ids(0), HALVES.plus, cost=Cost(bits_up=25), x=X)
    assert fleet.now == 2.5


def test_steps_may_depend_on_the_samples() -> None:
    fleet = build_fleet(_task(2, [3, 8]), HALVES, devices=Constant(seconds_per_step=1.0))
    r = fleet.ask(_ids(0, 1), HALVES.plus, cost=Cost(steps=lambda n: 2 * n), x=X)
    assert r.arrived_at.tolist() == [6.0, 16.0] and r.num_examples.tolist() == [3, 8]


def test_asking_waits_for_the_slowest_and_keeps_the_order_of_the_ids() -> None:
    fleet = _fleet((3.0, 1.0, 2.0))
    r = fleet.ask(_ids(2, 0, 1), HALVES.plus, x=X)
    assert r.ids.tolist() == [2, 0, 1] and r.arrived_at.tolist() == [2, 3, 1] and fleet.now == 3.0
    assert r["y"][:, 0].tolist() == [3, 1, 2]


def test_replies_say_how_long_they_took_and_what_was_logged() -> None:
    fleet = _fleet((3.0, 1.0, 2.0))
    r = fleet.ask(_ids(2, 0), HALVES.log, x=X)
    assert r.seconds.tolist() == [2, 3] and r.logged["seen"].tolist() == [2, 0]
    fleet.send(_ids(1), HALVES.log, x=X)
    fleet.receive(until=3.5)
    fleet.send(_ids(2), HALVES.log, x=X)
    r = fleet.receive()
    assert r.ids.tolist() == r.logged["seen"].tolist() == [1, 2] and r.seconds.tolist() == [1, 2]
    assert r.arrived_at.tolist() == [4, 5.5]


def test_what_is_logged_by_clients_that_send_nothing_is_not_heard() -> None:
    silent = Byzantine(ids=_ids(1), attack=lambda *_: None, seed=0)
    fleet = _fleet((3.0, 1.0, 2.0), byzantine=silent)
    r = fleet.ask(fleet.clients, HALVES.log, x=X)
    assert r.seconds.tolist() == [3, 2] and r.logged["seen"].tolist() == [0, 2]
    fleet.send(fleet.clients, HALVES.log, x=X)
    r = fleet.receive()
    assert r.seconds.tolist() == [2, 3] and r.logged["seen"].tolist() == [2, 0]


@pytest.mark.parametrize("attacked", [False, True])
def test_a_fold_may_be_given_the_weights_of_its_clients(attacked: bool) -> None:
    silent = Byzantine(ids=_ids(1), attack=lambda *_: None, seed=0)
    fleet = _fleet((3.0, 1.0, 2.0), byzantine=silent if attacked else None)
    weights = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64)
    got = fleet.ask(_ids(2, 1, 0), HALVES.plus, fold=Mean(), weights=weights, x=X)["y"]
    expected = 0.5 * (X + 2) + 2.0 * X + (0 if attacked else 0.25 * (X + 1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)


def test_replies_are_received_in_order_of_arrival_and_ties_in_order_of_sending() -> None:
    fleet = _fleet((2.0, 1.0, 2.0, 1.0))
    fleet.send(_ids(3, 2), HALVES.plus, x=X)
    fleet.send(_ids(1, 0), HALVES.plus, x=X)
    r = fleet.receive()
    assert r.ids.tolist() == [3, 1, 2, 0] and r.arrived_at.tolist() == [1, 1, 2, 2] and fleet.now == 2.0


def test_receiving_until_a_time_returns_what_is_due_and_moves_the_clock_there() -> None:
    fleet = _fleet((0.5, 1.0, 1.5))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert fleet.receive(until=1.0).ids.tolist() == [0, 1] and fleet.now == 1.0
    assert len(fleet.receive(until=1.2)) == 0 and fleet.now == 1.2
    assert fleet.receive(until=9.0).ids.tolist() == [2] and fleet.now == 9.0


def test_a_job_that_ends_with_the_window_counts_whatever_its_floats_say() -> None:
    fleet = _fleet((0.1,))
    for k in range(1, 60):  # 0.1 added sixty times is not 6.0
        fleet.send(_ids(0), HALVES.plus, x=X)
        assert len(fleet.receive(until=k * 0.1)) == 1, k


def test_receiving_a_count_moves_the_clock_to_the_last_of_them() -> None:
    fleet = _fleet((3.0, 1.0, 2.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert fleet.receive(count=2).ids.tolist() == [1, 2] and fleet.now == 2.0
    assert fleet.receive(count=5).ids.tolist() == [0] and fleet.now == 3.0


def test_receiving_a_count_until_a_time_stops_at_whichever_comes_first() -> None:
    fleet = _fleet((1.0, 2.0, 3.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert fleet.receive(until=2.5, count=1).ids.tolist() == [0] and fleet.now == 1.0
    assert fleet.receive(until=2.5, count=2).ids.tolist() == [1] and fleet.now == 2.5


def test_receiving_when_nothing_is_in_flight_returns_nothing_and_the_clock_stands() -> None:
    fleet = _fleet((1.0,))
    assert len(fleet.receive()) == len(fleet.receive(count=3)) == 0 and fleet.now == 0.0


def test_a_client_that_never_replies_does_not_block_the_window() -> None:
    fleet = _fleet((1.0, inf, 1.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert fleet.receive(until=2.0).ids.tolist() == [0, 2] and fleet.now == 2.0
    fleet.send(_ids(0, 2), HALVES.plus, x=X)
    assert fleet.receive(count=2).ids.tolist() == [0, 2] and fleet.now == 3.0
    with pytest.raises(ValueError, match="client 1 is still working"):
        fleet.send(_ids(1), HALVES.plus, x=X)


def test_asking_some_while_others_work_leaves_the_others_alone() -> None:
    fleet = _fleet((5.0, 1.0))
    fleet.send(_ids(0), HALVES.plus, x=X)
    fleet.ask(_ids(1), HALVES.plus, x=X)
    assert fleet.now == 1.0 and fleet.receive().ids.tolist() == [0] and fleet.now == 5.0


def test_idle_clients_are_present_and_those_at_work_are_not() -> None:
    fleet = _fleet((1.0, 2.0, 3.0))
    assert fleet.present().tolist() == [0, 1, 2]
    fleet.send(_ids(2, 0), HALVES.plus, x=X)
    assert fleet.present().tolist() == [1]
    fleet.send(_ids(1), HALVES.plus, x=X)
    assert len(fleet.present(at_least=0)) == 0
    assert len(fleet.present()) == 0, "replies come first"
    fleet.receive(count=2)
    assert fleet.present(at_least=2).tolist() == [0, 1]
    fleet.receive()
    with pytest.raises(ValueError, match="4 clients are needed at once, and there are 3"):
        fleet.present(at_least=4)


def test_the_timeline_notes_who_worked_from_when_to_when() -> None:
    fleet = _fleet((1.0, 2.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    fleet.receive(count=1)
    fleet.round = 1
    fleet.send(_ids(0), HALVES.plus, x=X)
    fleet.receive()
    assert fleet.timeline == [(0, 0.0, 1.0, 1), (1, 0.0, 2.0, 2), (0, 1.0, 2.0, 2)]  # and in which step it counted


def test_replies_are_computed_when_received_in_one_stack_with_all_in_flight() -> None:
    fleet = _fleet((1.0, 4.0, 6.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert _calls(fleet) == []
    fleet.receive(until=0.5)
    assert _calls(fleet) == []  # nothing is due yet
    fleet.receive(until=1.0)
    assert _calls(fleet) == [3]
    fleet.send(_ids(0), HALVES.plus, x=10 * X)
    fleet.receive(until=1.5)
    assert _calls(fleet) == [3]
    fleet.receive()
    assert _calls(fleet) == [3, 1]


def test_no_more_replies_wait_than_a_call_has_room_for() -> None:
    fleet = _fleet(tuple(float(k + 1) for k in range(8)), ahead=3)
    fleet.send(fleet.clients, HALVES.plus, x=X)
    got = [fleet.receive(count=1)["y"][0, 0].item() for _ in range(4)]
    assert _calls(fleet) == [3, 3]  # clients 0 to 2, and 3 to 5 once client 3 is due
    fleet.send(_ids(0), HALVES.plus, x=X)  # due at 5 as well, behind client 4
    got += fleet.receive(count=2)["y"][:, 0].tolist()
    assert _calls(fleet) == [3, 3, 2]  # client 0 and, as client 5 waits already, one more
    assert _waiting(fleet) == [5, 6]
    got += fleet.receive()["y"][:, 0].tolist()
    assert _calls(fleet) == [3, 3, 2, 1]
    assert got == [X[0] + k for k in (0, 1, 2, 3, 4, 0, 5, 6, 7)]


def test_more_that_is_due_at_once_is_computed_at_once() -> None:
    fleet = _fleet((1.0,) * 6 + (2.0,), ahead=2)
    fleet.send(fleet.clients, HALVES.plus, x=X)
    fleet.receive(until=1.0)
    assert _calls(fleet) == [6] and _waiting(fleet) == []


def test_replies_that_wait_keep_no_stack_of_others_alive() -> None:
    """One fast client makes new stacks again and again while slow ones wait."""
    fleet = _fleet((1.0, *(20.0 + k for k in range(5))), ahead=4, width=64)
    fleet.send(fleet.clients, HALVES.plus, x=X)
    for _ in range(12):
        fleet.receive(count=1)
        fleet.send(_ids(0), HALVES.plus, x=X)
    waiting = [e.result for e in fleet.queue if e.result is not None]
    fleet.state()
    kept = [e.result for e in fleet.queue if e.result is not None]
    assert len(kept) == len(waiting) == 3
    rows = {id(r.fields[0]): r.fields[0]["y"] for r in kept if r.fields}
    assert [len(y) for y in rows.values()] == [3]


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_replies_are_joined_by_stack_and_not_one_by_one() -> None:
    """On a GPU every operation is a launch."""
    counts = []
    for num_clients in (8, 64, 512):
        fleet = _fleet(tuple(1.0 + k % 2 for k in range(num_clients)), width=512, ahead=512)
        fleet.send(fleet.clients, HALVES.plus, x=X)
        with Operations() as operations:
            half = fleet.receive(until=1.0)
            rest = fleet.receive()
        assert _calls(fleet) == [num_clients] and len(half) == len(rest) == num_clients // 2
        counts.append(operations.count)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_what_is_computed_early_changes_no_reply(ahead: int, tmp_path: Path) -> None:
    def rounds(fleet: SimFleet, count: int) -> list[Any]:
        out = []
        for k in range(count):
            r = fleet.receive(count=2)
            out.append((r.ids.tolist(), r.fields, fleet.memory.of(fleet.clients)["n"].tolist()))
            fleet.send(r.ids, HALVES.count, x=(k + 1) * X)
        return out

    seconds = (1.0, 1.5, 2.2, 3.1, 4.7, 9.0)
    expected, got = list[Any](), list[Any]()
    for out, options in ((expected, {"ahead": 64}), (got, {"ahead": ahead, "width": 2})):
        fleet = _fleet(seconds, **options)
        fleet.send(fleet.clients, HALVES.count, x=X)
        out += rounds(fleet, 5)
        if out is got:  # and goes on from a checkpoint
            fleet = _reloaded(fleet, _fleet(seconds, **options), tmp_path)
        out += rounds(fleet, 5)
    for (ids, fields, rows), (ids_too, fields_too, rows_too) in zip(expected, got, strict=True):
        assert ids == ids_too and rows == rows_too
        assert all(torch.equal(fields[name], fields_too[name]) for name in fields)


def test_jobs_that_started_from_different_models_run_as_one_stack() -> None:
    fleet = _fleet((3.0, 3.0, 3.0))
    for k in range(3):
        fleet.send(_ids(k), HALVES.plus, x=(k + 1) * X)
        fleet.receive(until=0.1 * (k + 1))
    r = fleet.receive()
    assert _calls(fleet) == [3] and r.ids.tolist() == [0, 1, 2]
    torch.testing.assert_close(r["y"], torch.stack([(k + 1) * X + k for k in range(3)]), rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 2, 64])
def test_results_do_not_depend_on_when_they_are_computed(width: int) -> None:
    at_once = _fleet((1.0,) * 4, width=width).ask(_ids(0, 1, 2, 3), HALVES.draw, x=X)["u"]
    fleet = _fleet((4.0, 1.0, 2.0, 3.0), width=width)
    for k in (1, 2, 3, 0):
        fleet.send(_ids(k), HALVES.draw, x=k * X)
        fleet.receive(until=0.01 * k)
    r = fleet.receive()
    torch.testing.assert_close(r["u"][r.ids.argsort()], at_once, rtol=0, atol=0)


def test_different_work_in_flight_is_computed_apart() -> None:
    fleet = _fleet((1.0, 2.0))
    fleet.send(_ids(0), HALVES.plus, x=X)
    fleet.send(_ids(1), HALVES.draw, x=X)
    assert fleet.receive(count=1).fields.keys() == {"y"} and fleet.receive(count=1).fields.keys() == {"u"}


@pytest.mark.parametrize(
    "ids, message", [([0, 0], "named twice"), ([2], r"must lie in 0\.\.1"), ([-1], r"must lie in 0\.\.1")]
)
def test_clients_that_do_not_exist_or_are_named_twice_are_refused(ids: list[int], message: str) -> None:
    fleet = _fleet((1.0, 1.0))
    for call in (fleet.send, fleet.ask):
        with pytest.raises(ValueError, match=message):
            call(_ids(*ids), HALVES.plus, x=X)


def test_a_busy_client_is_refused_and_an_idle_one_is_not() -> None:
    fleet = _fleet((1.0, 1.0))
    fleet.send(_ids(0), HALVES.plus, x=X)
    for call in (fleet.send, fleet.ask):
        with pytest.raises(ValueError, match="client 0 is still working; receive its reply"):
            call(_ids(0, 1), HALVES.plus, x=X)
    fleet.receive()
    fleet.send(_ids(0, 1), HALVES.plus, x=X)


def test_a_refused_call_leaves_no_trace() -> None:
    fleet = _fleet((1.0, 1.0))
    with pytest.raises(ValueError, match="named twice"):
        fleet.ask(_ids(1, 1), HALVES.plus, x=X)
    assert fleet.job_counts.tolist() == [0, 0] and fleet.ledger.bits_down == 0 and not fleet.receive().ids.tolist()


def test_every_job_of_a_client_has_a_number_of_its_own() -> None:
    fleet = _fleet((1.0, 1.0))
    drawn = [fleet.ask(_ids(*who), HALVES.draw, x=X)["u"][:, 0].tolist() for who in ((0,), (0, 1), (1, 0))]
    expected = lambda client, job: float(stream(0, client, job).uniform("test", 1, dtype=torch.float64))  # noqa: E731
    assert drawn == [[expected(0, 0)], [expected(0, 1), expected(1, 0)], [expected(1, 1), expected(0, 2)]]
    assert fleet.job_counts.tolist() == [3, 2]


def test_memory_is_written_when_the_reply_is_received_and_not_before() -> None:
    fleet = _fleet((1.0, 5.0))
    fleet.send(fleet.clients, HALVES.count, x=X)
    fleet.receive(until=2.0)  # computes both, delivers one
    assert fleet.memory.of(fleet.clients)["n"].tolist() == [[1, 1], [0, 0]]
    fleet.send(_ids(0), HALVES.count, x=X)
    r = fleet.receive()
    assert r["n"].tolist() == [[2, 2], [1, 1]] and fleet.memory.of(fleet.clients)["n"].tolist() == [[2, 2], [1, 1]]


def test_staleness_counts_server_steps_since_the_work_was_sent() -> None:
    fleet = _fleet((1.0, 3.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert fleet.receive(count=1).staleness.tolist() == [0]
    assert fleet.end_round().values()["staleness_mean"] == 0
    fleet.round = 4
    assert fleet.receive().staleness.tolist() == [4]
    assert fleet.end_round().values() == {"num_clients": 1, "staleness_mean": 4.0}


def test_what_clients_log_is_averaged_by_samples_and_handed_over_once() -> None:
    fleet = _fleet((1.0, 1.0, 1.0), [1, 3, 0])
    fleet.ask(fleet.clients, HALVES.log, x=X)
    assert fleet.end_round().values() == {"seen": 0.75, "num_clients": 3}
    assert "seen" not in fleet.end_round().values()


def test_the_exception_of_a_client_names_work_round_and_clients() -> None:
    fleet = _fleet((1.0, 1.0))
    fleet.round = 6
    with pytest.raises(ClientError, match=r"fail failed in round 7 for client\(s\) 0, 1: RuntimeError: out of luck"):
        fleet.ask(fleet.clients, HALVES.fail, x=X)


@pytest.mark.parametrize("width, workers", [(1, 1), (2, 1), (2, 2), (64, 1)])
def test_a_fold_is_the_weighted_mean_of_replies_kept_apart(width: int, workers: int) -> None:
    samples = [1, 4, 2, 0, 3]
    fleet = _fleet((1.0,) * 5, samples, width=width, workers=workers)
    folded = fleet.ask(fleet.clients, HALVES.plus, fold=Mean(), x=X)["y"]
    apart = fleet.ask(fleet.clients, HALVES.plus, x=X)["y"]
    torch.testing.assert_close(folded, Mean()(apart, torch.tensor(samples).double()), rtol=0, atol=1e-14)


def test_a_rule_that_is_not_linear_says_that_it_cannot_be_folded() -> None:
    fleet = _fleet((1.0, 1.0))
    with pytest.raises(ValueError, match="Median is not linear, so replies can't be folded"):
        fleet.ask(fleet.clients, HALVES.plus, fold=Median(), x=X)  # type: ignore[arg-type]


def test_in_an_exchange_everybody_reads_everybody() -> None:
    fleet = _fleet((1.0, 2.0, 1.0), width=2)
    half = fleet.ask(fleet.clients, HALVES.plus, cost=Cost(vectors_up=0), x=X)
    out = fleet.exchange(half, HALVES.gather, scale=10.0)
    assert out["sum"].tolist() == [[10 * (3 * 1 + 3), 10 * (3 * 2 + 3)]] * 3
    assert out["own"].tolist() == half["y"].tolist()
    assert fleet.now == 2.0  # the second half is no work of its own


def test_an_exchange_counts_a_copy_for_every_peer_and_the_first_half_none() -> None:
    fleet = build_fleet(_task(3), HALVES, devices=Constant(seconds_per_step=0.0, downlink=64.0, uplink=32.0))
    half = fleet.ask(fleet.clients, HALVES.plus, cost=Cost(vectors_up=0), x=X)
    assert fleet.ledger.bits_up == 0 and fleet.ledger.bits_down == 3 * 64 and fleet.now == 1.0
    fleet.exchange(half, HALVES.gather, scale=1.0)
    assert fleet.ledger.bits_up == 3 * 2 * 64 and fleet.ledger.bits_down == 3 * 64 + 3 * 2 * 64
    assert fleet.now == 1.0 + 2 * 64 / 64 + 2 * 64 / 32


def test_an_exchange_is_the_second_half_of_a_job_and_keeps_its_number() -> None:
    fleet = _fleet((1.0, 1.0))
    half = fleet.ask(fleet.clients, HALVES.plus, cost=Cost(vectors_up=0), x=X)
    fleet.exchange(half, HALVES.gather, scale=1.0)
    assert fleet.job_counts.tolist() == [1, 1]


def test_with_adversarial_arrival_every_client_misses_f_others_but_never_itself() -> None:
    fleet = _fleet((1.0,) * 8)
    missed = set()
    for _ in range(6):
        half = fleet.ask(fleet.clients, HALVES.plus, cost=Cost(vectors_up=0), x=torch.zeros(2).double())
        out = fleet.exchange(half, HALVES.gather, missing=1, scale=1.0)
        lost = (28 - out["sum"][:, 0]).tolist()  # ids sum to 28; client 0 missed reads 28 as well
        assert all(value != i for i, value in enumerate(lost) if i)
        missed.add(tuple(lost))
    assert len(missed) == 6


def test_what_clients_hold_costs_nothing_and_comes_with_the_second_half_of_their_job() -> None:
    fleet = build_fleet(quadratic([1.0] * 3, [0.0] * 3, 0.0), Halves(), devices=Clocks((1.0, 2.0, 3.0)))
    with pytest.raises(ValueError, match="holds nothing; ask it first"):
        fleet.ask(torch.tensor([0]), Halves().draw, x=Held(X))
    first = fleet.ask(torch.tensor([0, 2]), Halves().draw, x=X)
    spent = fleet.ledger.bits_down
    again = fleet.ask(torch.tensor([0, 2]), Halves().draw, x=Held(X))
    assert torch.equal(first["u"], again["u"]) and fleet.ledger.bits_down == spent == 2 * 64
    assert fleet.ask(torch.tensor([0, 2]), Halves().plus, x=Held(X))["y"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert fleet.job_counts.tolist() == [1, 0, 1] and fleet.now == 9.0
    assert fleet.end_round().values()["num_clients"] == 2


def test_broadcasts_and_replies_cost_32_bits_a_number_one_a_flag_and_nothing_for_nothing() -> None:
    fleet = _fleet((1.0, 1.0))
    fleet.ask(fleet.clients, HALVES.numbers, x=X, flag=True, rate=0.1, none=None)
    assert fleet.ledger.bits_down == 2 * (64 + 1 + 32) and fleet.ledger.bits_up == 2 * (64 + 32)


def test_downloads_count_when_sent_and_uploads_when_received() -> None:
    fleet = _fleet((1.0, 2.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    assert (fleet.ledger.bits_down, fleet.ledger.bits_up) == (128, 0)
    fleet.receive(count=1)
    assert (fleet.ledger.bits_down, fleet.ledger.bits_up) == (128, 64)


def test_sending_to_nobody_costs_nothing_and_moves_no_copy() -> None:
    down = Downlink(compressor=TopK(k=1), seed=0)
    fleet = _fleet((1.0,), downlink=down)
    fleet.ask(_ids(0), HALVES.plus, x=X)
    spent = fleet.ledger.bits_down
    fleet.send(_ids(), HALVES.plus, x=5 * X)
    assert down.copies["x"].version == 1 and fleet.ledger.bits_down == spent and not fleet.sent


def test_job_times_are_those_of_real_jobs_and_draw_nothing_from_them() -> None:
    devices = Clocks((1.0, 2.0), downlink=64.0, uplink=16.0)
    fleet = _fleet((1.0, 2.0), devices=devices)
    assert fleet.job_times(Cost(), 7, x=X).mean.tolist() == [1 + 1 + 4, 2 + 1 + 4]
    assert fleet.ask(fleet.clients, HALVES.plus, x=X).arrived_at.tolist() == [6.0, 7.0]
    assert fleet.job_counts.tolist() == [1, 1]


def test_job_times_are_drawn_where_their_law_is_not_known() -> None:
    fleet, fresh = (_fleet((1.0, 2.0), devices=LogNormal(jitter=0.5)) for _ in range(2))
    times = fleet.job_times(Cost(), 7, x=X)
    assert times.drawn is not None and times.drawn.shape == (2, 7) and len(times.drawn.unique()) == 14
    assert torch.equal(times.mean, times.drawn.mean(1))
    took, other = (f.ask(f.clients, HALVES.plus, x=X).arrived_at for f in (fleet, fresh))
    assert torch.equal(took, other) and not bool(torch.isin(took, times.drawn).any())


def test_job_times_count_the_bits_that_compressed_jobs_do() -> None:
    devices = Clocks((1.0, 2.0, 0.5), downlink=32.0, uplink=8.0)
    fleet = _fleet((1.0, 2.0, 0.5), devices=devices, downlink=Downlink(compressor=Natural(), seed=0), reply_bits=11)
    fleet.ask(fleet.clients, HALVES.plus, x=X, rate=1.0)  # from now on everybody has a copy
    for missed in range(1, 6):  # client 2 misses more and more
        start = fleet.now
        for _ in range(missed - 1):
            fleet.ask(_ids(0, 1), HALVES.plus, x=X, rate=1.0)
        start, messages = fleet.now, torch.tensor([1, 1, missed])
        took = fleet.ask(fleet.clients, HALVES.plus, x=X, rate=1.0).arrived_at - start
        expected = fleet.job_times(Cost(), 7, messages, x=X, rate=1.0).mean
        torch.testing.assert_close(took, expected, rtol=0, atol=1e-9)
    assert float(fleet.job_times(Cost(), 7, x=X, rate=1.0).mean[0]) == (2 * 9 + 32) / 32 + 1.0 + 11 / 8


def test_what_is_in_flight_survives_a_stop() -> None:
    def begin() -> SimFleet:
        fleet = _fleet((1.0, 5.0, 2.5))
        fleet.send(fleet.clients, HALVES.count, x=X)
        fleet.receive(until=1.2)
        fleet.send(_ids(0), HALVES.count, x=3 * X)
        fleet.round = 2
        return fleet

    one, other = begin(), _fleet((1.0, 5.0, 2.5))
    other.load(begin().state())
    other.round = 2
    for fleet in (one, other):
        with pytest.raises(ValueError, match="client 1 is still working"):
            fleet.send(_ids(1), HALVES.count, x=X)
    for _ in range(3):
        a, b = one.receive(count=1), other.receive(count=1)
        assert a.ids.tolist() == b.ids.tolist() and torch.equal(a["n"], b["n"])
        assert one.now == other.now and a.staleness.tolist() == b.staleness.tolist()
    assert one.timeline == other.timeline and one.ledger == other.ledger
    assert torch.equal(one.job_counts, other.job_counts)


# Calling off -----------------------------------------------------------------------------------------------------


def test_a_job_that_is_called_off_frees_its_client_and_leaves_nothing() -> None:
    fleet = _fleet((1.0, 2.0, 3.0, 4.0))
    fleet.send(fleet.clients, HALVES.count, x=X)
    assert fleet.receive(count=1).ids.tolist() == [0]
    up, down = fleet.ledger.bits_up, fleet.ledger.bits_down
    fleet.cancel(torch.tensor([0, 1, 3]))  # of whom the first has nothing to do
    assert fleet.now == 1.0 and fleet.ledger.bits_up == up and fleet.ledger.bits_down == down == 4 * 64
    assert fleet.receive().ids.tolist() == [2] and fleet.now == 3.0
    assert not fleet.sent and len(fleet.queue) == 0
    assert fleet.timeline == [(0, 0.0, 1.0, 1), (1, 0.0, 1.0, 1), (3, 0.0, 1.0, 1), (2, 0.0, 3.0, 1)]
    again = fleet.ask(fleet.clients, HALVES.count, x=X)
    assert again["n"][:, 0].tolist() == [2.0, 1.0, 2.0, 1.0]  # what a client did in vain it does not remember
    assert fleet.job_counts.tolist() == [2, 2, 2, 2]


def test_a_job_that_is_called_off_is_not_in_a_checkpoint(tmp_path: Path) -> None:
    fleet = _fleet((1.0, 2.0, 3.0))
    fleet.send(fleet.clients, HALVES.plus, x=X)
    fleet.receive(count=1)
    fleet.cancel(torch.tensor([1]))
    again = _reloaded(fleet, _fleet((1.0, 2.0, 3.0)), tmp_path)
    assert [e.client for e in again.queue] == [2]
    again.send(torch.tensor([1]), HALVES.plus, x=X)
    assert again.receive().ids.tolist() == [2, 1] and again.now == 3.0
