from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from torch import Tensor

from fedsim.aggregate import Mean, Median
from fedsim.clients.flower_app import answer
from fedsim.cohort import Cohort
from fedsim.compress.sparsify import TopK
from fedsim.fleet import Cost, DrivenFleet
from fedsim.flower import wire
from fedsim.flower.client import app_of
from fedsim.flower.clock import Patience
from fedsim.flower.door import Door
from fedsim.flower.fleet import FlowerFleet
from fedsim.flower.foreign.private import number
from fedsim.flower.mail import Mail
from fedsim.flower.nodes import connect, reason
from fedsim.sim.executor import ClientError, StackRunner
from fedsim.sim.links import Downlink
from tests.build import heard_sum, quadratic
from tests.fedsim.flower.local_grid import LocalGrid, VirtualClock

NUM = 4
TASK = quadratic([1.0] * NUM, [0.0] * NUM, 1.0, num_examples=[4, 3, 2, 1])
PATIENCE = Patience(reply_seconds=60.0, poll_seconds=0.1)
NOTHING = Cost(vectors_up=0)
DOOR = Door(book=wire.Book({}), seed=0, model_size=1)


class Halves:
    """Client halves whose answers say who was asked what."""

    def tell(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        clients.log(asked=clients.streams.jobs.double())
        return {"v": x + clients.ids[:, None].to(x), "job": clients.streams.jobs.clone()}

    def fail(self, clients: Cohort) -> dict[str, Tensor]:
        if int(clients.ids[0]) == 2:
            raise ValueError("no data today")
        return {}

    def count(self, clients: Cohort) -> dict[str, Tensor]:
        clients.memory["n"] = n = clients.memory.read("n", (1,)) + 1
        return {"n": n}

    def hear(self, clients: Cohort, inbox: Any) -> dict[str, Tensor]:
        return {"sum": heard_sum(inbox, "v"), "own": inbox.own("v")}

    def score(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        return {"examples": clients.num_examples, "loss": x + clients.ids.to(x)}

    def _secret(self, clients: Cohort) -> dict[str, Tensor]:
        return {}


HALVES = Halves()
ALL = torch.arange(NUM)
X = torch.tensor([10.0])


def app(book: wire.Book = DOOR.book) -> ClientApp:
    runner = StackRunner(TASK, HALVES, 0, torch.device("cpu"))
    return app_of(partial(answer, lambda context: (runner, book, {})))


def build(
    seconds: Callable[[int], float] = lambda i: 1.0, needs_all: str | None = None
) -> tuple[FlowerFleet, LocalGrid]:
    clock = VirtualClock()
    grid = LocalGrid(app(), NUM, clock=clock, seconds=seconds)
    nodes = connect(grid, NUM, DOOR, clock, PATIENCE)
    return FlowerFleet(Mail(grid, nodes, DOOR, clock, PATIENCE), seed=0, model_size=1, needs_all=needs_all), grid


def test_replies_stand_in_the_order_of_ids_whatever_the_order_of_arrival() -> None:
    fleet, _ = build(lambda i: 4.0 - i)
    r = fleet.ask(torch.tensor([2, 0, 3]), HALVES.tell, x=X)
    assert r.ids.tolist() == [2, 0, 3] and r.num_examples.tolist() == [2, 4, 1]
    assert r["v"].tolist() == [[12.0], [10.0], [13.0]]
    assert r.arrived_at.tolist() == pytest.approx([2.0, 4.0, 1.0], abs=0.11)
    assert r.seconds.tolist() == r.arrived_at.tolist() and r.logged["asked"].tolist() == [0, 0, 0]
    fleet.send(torch.tensor([3]), HALVES.tell, x=X)
    r = fleet.receive()
    assert r.seconds.tolist() == pytest.approx([1.0], abs=0.11) and r.logged["asked"].tolist() == [1]


def test_a_fold_is_the_weighted_mean() -> None:
    fleet, _ = build()
    r = fleet.ask(ALL, HALVES.tell, fold=Mean(), x=X)
    assert r["v"].tolist() == pytest.approx([10 + (0 * 4 + 1 * 3 + 2 * 2 + 3 * 1) / 10])
    assert r["job"].tolist() == [0] * 4
    given = torch.tensor([1.0, 0.5], dtype=torch.float64)
    r = fleet.ask(torch.tensor([3, 1]), HALVES.tell, fold=Mean(), weights=given, x=X)
    assert r["v"].tolist() == pytest.approx([13.0 + 0.5 * 11.0])


def test_a_rule_that_is_not_linear_cannot_fold() -> None:
    fleet, _ = build()
    with pytest.raises(ValueError, match="is not linear"):
        fleet.ask(ALL, HALVES.tell, fold=Median(), x=X)  # type: ignore[arg-type]


def test_what_a_late_job_wrote_is_forgotten_when_its_reply_was() -> None:
    fleet, _ = build(lambda i: 5.0 if i == 3 else 1.0)
    assert fleet.ask(ALL, HALVES.count)["n"].tolist() == [[1.0]] * NUM
    for _ in range(2):  # client 3 does its jobs all the same
        assert fleet.ask(ALL, HALVES.count, within=2.0)["n"].numel() == NUM - 1
    assert fleet.ask(ALL, HALVES.count)["n"].tolist() == [[4.0]] * (NUM - 1) + [[2.0]]
    assert fleet.ask(ALL, HALVES.count)["n"].tolist() == [[5.0]] * (NUM - 1) + [[3.0]]


def test_a_restored_fleet_finds_the_memory_of_its_last_checkpoint_however_long_ago_that_was() -> None:
    fleet, grid = build(lambda i: 1.0 + i)
    fleet.ask(ALL, HALVES.count)
    fleet.send(torch.tensor([0, 3]), HALVES.count)
    fleet.mail.wait(lambda: bool(fleet.mail.landed))  # a reply that nobody has taken is asked for again
    state = deepcopy(fleet.state())
    fleet.receive()
    for _ in range(3):
        fleet.ask(ALL, HALVES.count)
    assert {len(context.state.array_records) for context in grid.contexts.values()} == {3}
    fleet = FlowerFleet(Mail(grid, fleet.mail.nodes, DOOR, grid.clock, PATIENCE), seed=0, model_size=1)
    fleet.load(state)
    again = fleet.receive()
    assert (again.ids.tolist(), again["n"].tolist()) == ([0, 3], [[2.0], [2.0]])
    assert fleet.devices()["replied"].tolist() == [2, 1, 1, 2], "a reply counts once, when it is taken"
    assert fleet.ask(ALL, HALVES.count)["n"].tolist() == [[3.0], [2.0], [2.0], [3.0]]


def test_jobs_are_numbered_for_each_client_on_its_own() -> None:
    fleet, _ = build()
    fleet.ask(torch.tensor([1, 3]), HALVES.tell, x=X)
    assert fleet.ask(ALL, HALVES.tell, x=X)["job"].tolist() == [0, 1, 0, 1]
    assert fleet.end_round().values() == {"asked": pytest.approx(4 / 14), "num_clients": 6}


def test_a_window_ends_when_it_ends_and_late_replies_wait_for_the_next() -> None:
    fleet, _ = build(lambda i: [0.5, 2.5, 0.8, 9.0][i])
    start = fleet.now
    fleet.send(ALL, HALVES.tell, x=X)
    first = fleet.receive(until=start + 1.0)
    assert first.ids.tolist() == [0, 2] and fleet.now == pytest.approx(start + 1.0)
    fleet.round = 2
    second = fleet.receive(until=start + 3.0)
    assert second.ids.tolist() == [1] and second.staleness.tolist() == [2]
    third = fleet.receive(until=start + 4.0)
    assert len(third) == 0 and fleet.now == pytest.approx(start + 4.0)
    assert fleet.receive().ids.tolist() == [3]


def test_counted_replies_come_in_order_of_arrival_and_the_rest_stays() -> None:
    fleet, _ = build(lambda i: 3.0 - 0.5 * i)
    fleet.send(ALL, HALVES.tell, x=X)
    assert fleet.receive(count=2).ids.tolist() == [3, 2]
    assert fleet.receive(count=5).ids.tolist() == [1, 0]


def test_two_that_arrive_together_may_be_received_one_by_one() -> None:
    fleet, _ = build()
    fleet.send(ALL, HALVES.tell, x=X)
    assert [fleet.receive(count=1).ids.tolist() for _ in range(4)] == [[0], [1], [2], [3]]


def test_a_busy_client_is_not_sent_more() -> None:
    fleet, _ = build()
    fleet.send(torch.tensor([1]), HALVES.tell, x=X)
    assert fleet.present().tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="client 1 is still working"):
        fleet.ask(ALL, HALVES.tell, x=X)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.3"):
        fleet.send(torch.tensor([4]), HALVES.tell, x=X)
    with pytest.raises(ValueError, match="named twice"):
        fleet.send(torch.tensor([2, 2]), HALVES.tell, x=X)


def test_a_job_that_is_called_off_frees_its_client_and_its_reply_never_comes() -> None:
    fleet, _ = build(lambda i: 1.0 + i)
    fleet.send(ALL, HALVES.tell, x=X)
    assert fleet.receive(until=fleet.now + 1.5).ids.tolist() == [0]
    fleet.cancel(torch.tensor([0, 1, 3]))
    assert fleet.receive().ids.tolist() == [2] and not fleet.sent and not fleet.mail.flights
    up = fleet.ledger.bits_up
    again = fleet.ask(torch.tensor([1, 3]), HALVES.tell, x=X + 5)
    assert again["v"].tolist() == [[16.0], [18.0]] and again["job"].tolist() == [1, 1]
    assert fleet.ledger.bits_up - up == 2 * (32 + 32)


def test_a_failing_client_costs_its_reply_and_is_named_with_its_round_and_reason() -> None:
    fleet, grid = build()
    fleet.round = 7
    named = rf"client 2 \(node {fleet.mail.nodes.node_ids[2]}\), fail of round 8: .*no data today"
    with pytest.warns(UserWarning, match=named):
        assert fleet.ask(ALL, HALVES.fail, cost=NOTHING).ids.tolist() == [0, 1, 3]
    assert fleet.num_at_work == 0 and fleet.end_round().values() == {"num_clients": 3, "num_failed": 1}
    with pytest.warns(UserWarning, match="no data today"):
        fleet.send(ALL, HALVES.fail, cost=NOTHING)
        assert fleet.receive().ids.tolist() == [0, 1, 3]
    assert not grid.contexts[fleet.mail.nodes.node_ids[2]].state, "a client that failed has written nothing"


def test_a_round_in_which_every_client_fails_ends_the_run() -> None:
    fleet, grid = build()
    with (
        pytest.raises(ClientError, match="every client failed: client 2 .*no data today"),
        pytest.warns(UserWarning, match="no data today"),
    ):
        fleet.ask(torch.tensor([2]), HALVES.fail, cost=NOTHING)
    fleet, grid = build()
    grid.gone = {0, 1}
    with pytest.warns(UserWarning, match="no data today"):  # nobody answers, and two of them may be back later
        assert not len(fleet.ask(torch.tensor([0, 1, 2]), HALVES.fail, cost=NOTHING))


def test_a_strategy_that_needs_every_reply_says_why_it_ends() -> None:
    fleet, grid = build(needs_all="each has a part")
    assert fleet.ask(ALL, HALVES.tell, x=X).ids.tolist() == [0, 1, 2, 3]
    grid.gone = {1}
    silent = r"no reply for 60.0 seconds from client\(s\) 1 \(tell, round 1\); .* without: each has a part"
    with pytest.raises(ClientError, match=silent), pytest.warns(UserWarning, match="node unavailable"):
        fleet.ask(ALL, HALVES.tell, x=X)


def test_where_every_reply_is_needed_a_node_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, grid = build(needs_all="each has a part")
    assert fleet.ask(ALL, HALVES.count)["n"].tolist() == [[1.0]] * NUM
    grid.gone = {1, 2}
    start, back = grid.clock.now(), {10.0: 2, 40.0: 1}  # seconds after which who comes back

    def sleep(seconds: float) -> None:
        VirtualClock.sleep(grid.clock, seconds)  # type: ignore[arg-type]
        grid.gone = {client for after, client in back.items() if grid.clock.now() - start < after}

    monkeypatch.setattr(grid.clock, "sleep", sleep)
    with pytest.warns(UserWarning, match=r"client [12] .*, count of round 1: node unavailable .* asked again when"):
        r = fleet.ask(ALL, HALVES.count)
    assert r.ids.tolist() == [0, 1, 2, 3] and r["n"].tolist() == [[2.0]] * NUM
    assert r.seconds.tolist() == pytest.approx([1.0, 41.0, 11.0, 1.0], abs=0.3)
    assert fleet.num_at_work == 0 and not fleet.mail.absent
    assert fleet.ask(ALL, HALVES.count)["n"].tolist() == [[3.0]] * NUM
    assert len(fleet.mail.contents) == NUM, "no more than the last call's"


def test_a_client_half_that_is_private_or_unknown_is_not_run() -> None:
    fleet, _ = build()
    with (
        pytest.raises(ClientError, match="has no client half '_secret'"),
        pytest.warns(UserWarning, match="has no client half '_secret'"),
    ):
        fleet.ask(ALL, HALVES._secret)


def test_a_silent_client_costs_its_reply_when_patience_is_over() -> None:
    fleet, _ = build(lambda i: 1e9 if i == 1 and fleet_ready else 1.0)
    fleet_ready.append(True)
    try:
        silent = r"no reply for 60.0 seconds from client\(s\) 1 \(tell, round 1\)"
        with pytest.warns(UserWarning, match=silent):
            assert fleet.ask(ALL, HALVES.tell, x=X).ids.tolist() == [0, 2, 3]
        assert fleet.num_at_work == 0 and fleet.end_round().values()["num_dropped"] == 1
        with pytest.raises(ClientError, match=r"no reply for 60.0 seconds from client\(s\) 1 \(tell, round 2\)"):
            fleet.ask(torch.tensor([1]), HALVES.tell, x=X)
    finally:
        fleet_ready.clear()


fleet_ready: list[bool] = []


def test_connected_clients_are_present_and_one_that_is_gone_costs_its_reply() -> None:
    fleet, grid = build()
    grid.gone = {1}
    assert fleet.present().tolist() == [0, 2, 3]
    r = fleet.ask(ALL, HALVES.tell, fold=Mean(), x=X)
    assert r.ids.tolist() == [0, 2, 3] and fleet.num_at_work == 0 and not fleet.sent
    assert r["v"].tolist() == pytest.approx([10 + (0 * 4 + 2 * 2 + 3 * 1) / 7])
    fleet.send(torch.tensor([1, 2]), HALVES.tell, x=X)
    assert fleet.receive(count=2).ids.tolist() == [2] and fleet.num_at_work == 0
    assert fleet.end_round().values()["num_dropped"] == 2
    grid.gone = set()
    assert fleet.present(at_least=4).tolist() == [0, 1, 2, 3]


def test_too_few_connected_clients_end_the_run_when_patience_is_over() -> None:
    fleet, grid = build()
    grid.gone = {0, 1, 2}
    assert fleet.present(at_least=0).tolist() == [3]
    with pytest.raises(
        ClientError, match="1 of 4 clients were connected within 60.0 seconds, and 2 are needed at once"
    ):
        fleet.present(at_least=2)


@pytest.mark.parametrize("late", ["drop", "keep"])
def test_a_deadline_ends_a_round_and_late_replies_are_dropped_or_kept(late: Any) -> None:
    fleet, _ = build(lambda client: 1.0 + 2 * client)
    r = fleet.ask(ALL, HALVES.tell, within=2.0, late=late, x=X)
    assert r.ids.tolist() == [0] and fleet.now == pytest.approx(2.0)
    assert fleet.end_round().values()["num_late"] == 3
    r = fleet.ask(torch.tensor([0]), HALVES.tell, within=9.0, first=1, late=late, x=2 * X)
    kept = [1] if late == "keep" else []
    assert r.ids.tolist() == [0, *kept] and r.staleness.tolist() == [0, *(1 for _ in kept)]
    assert r["v"].flatten().tolist() == [20.0, *(11.0 for _ in kept)] and fleet.num_at_work == 2 * len(kept)


@pytest.mark.parametrize("why", ["gone", "silent"])
def test_an_evaluation_leaves_out_whom_it_does_not_hear_of(why: str) -> None:
    fleet, grid = build(lambda client: 1e9 if client == 1 and why == "silent" and fleet_ready else 1.0)
    fleet_ready.append(True)
    try:
        grid.gone = {1} if why == "gone" else set()
        with pytest.warns(UserWarning, match=r"score goes on without client\(s\) 1$"):
            found = fleet.evaluate(ALL, HALVES.score, x=X)
        assert found["loss"].nan_to_num(-1.0).tolist() == [10.0, -1.0, 12.0, 13.0]
        grid.gone = set(range(4))
        with pytest.warns(UserWarning, match=r"goes on without client\(s\) 0, 1, 2, 3$"):
            assert fleet.evaluate(ALL, HALVES.score, x=X) == {}
    finally:
        fleet_ready.clear()


def test_memory_lasts_from_message_to_message_and_a_node_that_lost_it_says_so() -> None:
    fleet, grid = build()
    fleet.ask(ALL, HALVES.count)
    assert fleet.ask(torch.tensor([0, 2]), HALVES.count)["n"].tolist() == [[2.0], [2.0]]
    assert fleet.mail.versions.tolist() == [2, 1, 2, 1]
    node = fleet.mail.nodes.node_ids[2]
    grid.contexts[node].state = RecordDict()
    with pytest.warns(UserWarning, match=r"client 2 .*wrote its memory 2 times, and here is what it was after 0"):
        assert fleet.ask(ALL, HALVES.count).ids.tolist() == [0, 1, 3]


def compressed(seconds: Callable[[int], float] = lambda i: 1.0) -> tuple[FlowerFleet, LocalGrid]:
    """A fleet whose broadcasts go as changes."""
    rule = TopK(k=1)
    book, clock = wire.Book({"downlink": rule}), VirtualClock()
    grid = LocalGrid(app(book), NUM, clock=clock, seconds=seconds)
    door = replace(DOOR, book=book)
    mail = Mail(grid, connect(grid, NUM, door, clock, PATIENCE), door, clock, PATIENCE)
    return FlowerFleet(mail, seed=0, model_size=1, downlink=Downlink(compressor=rule, seed=0)), grid


def test_a_change_that_nobody_knows_did_not_arrive_costs_one_reply_and_no_wrong_number() -> None:
    fleet, grid = compressed(lambda i: 5.0 if i == 1 else 1.0)
    fleet.ask(ALL, HALVES.tell, x=X)
    grid.gone = {1}
    assert fleet.ask(ALL, HALVES.tell, within=2.0, x=X + 1).ids.tolist() == [0, 2, 3]  # before the error is there
    grid.gone = set()
    with pytest.warns(UserWarning, match="client 1 .*change 3 of 'x' arrived, and no copy after change 2 is here"):
        assert fleet.ask(ALL, HALVES.tell, x=X + 2)["v"].tolist() == [[12.0], [14.0], [15.0]]
    assert fleet.ask(ALL, HALVES.tell, x=X + 3)["v"].tolist() == [[13.0], [14.0], [15.0], [16.0]]


def test_a_client_that_is_back_without_its_copy_is_sent_the_whole_vector() -> None:
    fleet, grid = compressed()
    fleet.ask(ALL, HALVES.tell, x=X)
    grid.gone = {1}
    assert fleet.ask(ALL, HALVES.tell, x=X + 1).ids.tolist() == [0, 2, 3]
    grid.gone = set()
    grid.contexts[fleet.mail.nodes.node_ids[1]].state = RecordDict()
    assert fleet.ask(ALL, HALVES.tell, x=X + 2)["v"].tolist() == [[12.0], [13.0], [14.0], [15.0]]


def test_peers_hear_each_other_through_the_server() -> None:
    fleet, _ = build()
    half = fleet.ask(ALL, HALVES.tell, x=X)
    out = fleet.exchange(half, HALVES.hear)
    assert out["own"].tolist() == half["v"].tolist()
    assert out["sum"].tolist() == [[46.0]] * 4
    some = fleet.exchange(half, HALVES.hear, missing=1)
    lost = [46.0 - s for s in some["sum"].flatten().tolist()]
    assert all(10 <= v <= 13 and v != own for v, own in zip(lost, half["v"].flatten().tolist(), strict=True))


def test_what_jobs_took_is_measured() -> None:
    fleet, _ = build(lambda i: 1.0 + i)
    fleet.ask(torch.tensor([0, 2]), HALVES.tell, x=X)
    tau = fleet.job_times(Cost(), 7).mean
    assert tau.shape == (NUM,)
    assert tau[[0, 2]].tolist() == pytest.approx([1.0, 3.0], abs=0.11)
    assert bool(torch.isnan(tau[[1, 3]]).all())
    known, again = fleet.devices(), build(lambda i: 1.0)[0]
    assert known["replied"].tolist() == [1, 0, 1, 0] and known["dropped"].tolist() == [0] * NUM
    assert torch.equal(known["mean_seconds"].isnan(), tau.isnan())
    again.load(fleet.state())
    assert all(torch.equal(v.nan_to_num(-1), known[k].nan_to_num(-1)) for k, v in again.devices().items())


def test_a_restored_fleet_sends_open_jobs_again_with_their_numbers() -> None:
    fleet, _ = build(lambda i: 1.0 + i)
    fleet.send(ALL, HALVES.tell, x=X)
    fleet.round = 1
    fleet.receive(count=2)
    state, before = fleet.state(), fleet.now
    other, _ = build(lambda i: 1.0 + i)
    other.load(state)
    assert other.now == pytest.approx(before)
    other.round = 3
    r = other.receive()
    assert r.ids.tolist() == [2, 3] and r["job"].tolist() == [0, 0] and r.staleness.tolist() == [3, 3]
    assert r["v"].tolist() == [[12.0], [13.0]]


def test_the_loop_can_run_on_it() -> None:
    fleet: DrivenFleet = build()[0]
    assert fleet.ledger.bits_up == 0 and set(fleet.state_classes) == {"Flight", "Sent", "Ledger", "Copy"}


def test_bits_are_those_of_the_values() -> None:
    fleet, _ = build()
    fleet.ask(torch.tensor([0, 1, 2]), HALVES.tell, x=X)
    assert (fleet.ledger.bits_up, fleet.ledger.bits_down) == (3 * 64, 3 * 32)


def grid_of(partitions: list[Any]) -> LocalGrid:
    grid = LocalGrid(app(), len(partitions))
    for context, partition in zip(grid.contexts.values(), partitions, strict=True):
        context.node_config["partition-id"] = partition
    return grid


def test_clients_are_known_by_partition_id_and_not_by_node() -> None:
    grid = grid_of([3, 1, 0, 2])
    nodes = connect(grid, NUM, DOOR, VirtualClock(), PATIENCE)
    assert [grid.contexts[n].node_config["partition-id"] for n in nodes.node_ids] == [0, 1, 2, 3]
    assert nodes.num_examples.tolist() == [4, 3, 2, 1]


def test_a_node_that_leaves_before_it_has_said_who_it_is_is_asked_again() -> None:
    class Late(LocalGrid):
        def get_node_ids(self) -> list[int]:
            self.gone = {1} if self.clock.now() < 5.0 else set()
            return list(self.contexts)

    grid = Late(app(), NUM)
    assert connect(grid, NUM, DOOR, grid.clock, PATIENCE).num_examples.tolist() == [4, 3, 2, 1]
    assert grid.clock.now() == pytest.approx(5.0, abs=2 * PATIENCE.poll_seconds)


class Unreadable(LocalGrid):
    """A grid on which one device's replies are not what they should be to Flower itself."""

    lie: Callable[[list[Message]], Iterable[Message]] = staticmethod(lambda found: found)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.lie(list(super().pull_messages(message_ids)))


def renamed(found: list[Message]) -> Iterable[Message]:
    """Replies, the second of which says that it answers a message that nobody sent."""
    for message in found[1:2]:
        message.metadata.__dict__["_reply_to_message_id"] = "no message"
    return found


def unreadable(found: list[Message]) -> Iterable[Message]:
    return [inflate_object_from_contents("7", {"7": b"Message  5\x00junk!"}) for _ in found]  # type: ignore[misc]


def test_a_reply_to_a_message_that_nobody_sent_is_none() -> None:
    clock = VirtualClock()
    grid = Unreadable(app(), NUM, clock=clock)
    nodes = connect(grid, NUM, DOOR, clock, PATIENCE)
    fleet = FlowerFleet(Mail(grid, nodes, DOOR, clock, PATIENCE), seed=0, model_size=1)
    grid.lie = renamed
    with pytest.warns(UserWarning, match=r"no reply for 60.0 seconds from client\(s\) 1 "):
        assert fleet.ask(ALL, HALVES.tell, x=X).ids.tolist() == [0, 2, 3]
    with pytest.warns(UserWarning, match=r"score goes on without client\(s\) 1$"):
        assert fleet.evaluate(ALL, HALVES.score, x=X)["loss"].isnan().tolist() == [False, True, False, False]
    with pytest.raises(ClientError, match="no node with partition-id 1"):
        connect(grid, NUM, DOOR, clock, PATIENCE)


def test_what_flower_itself_cannot_read_ends_the_run_with_one_message() -> None:
    grid = Unreadable(app(), NUM)
    grid.lie = unreadable
    with pytest.raises(ClientError, match=r"Flower can't read what one of the devices sent.*find the device"):
        connect(grid, NUM, DOOR, grid.clock, PATIENCE)


def test_what_a_device_says_of_its_error_is_one_line_of_bounded_length() -> None:
    asked = Message(RecordDict(), 5, "train")
    said = reason(Message(Error(code=1, reason="a\nb\x1b[2J" + "c" * 10**6), reply_to=number(asked, "1")))
    assert said.startswith("a b [2Jccc") and said.isprintable() and len(said) < 2100


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ([0, 1, 2, 2], "both have partition-id=2"),
        ([0, 1, 2, 9], "partition-id=9 is not one of the experiment's 4 clients"),
        ([0, 1, 3], "no node with partition-id 2 within 60.0 seconds"),
    ],
)
def test_nodes_that_do_not_fit_the_experiment_are_refused(partitions: list[int], message: str) -> None:
    with pytest.raises(ClientError, match=message):
        connect(grid_of(partitions), NUM, DOOR, VirtualClock(), PATIENCE)


def test_a_node_without_a_partition_id_is_told_how_to_get_one() -> None:
    with pytest.raises(ClientError, match="start it with --node-config"):
        connect(grid_of([None, 1, 2, 3]), NUM, DOOR, VirtualClock(), PATIENCE)
