"""Byzantine clients: whose vectors are replaced, when, and what an attack sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.aggregate import Mean
from fedsim.clients.byzantine import Alie, Dissensus, InnerProduct, LabelFlip, Mimic, NotANumber, SignFlip, Silence
from fedsim.cohort import Cohort
from fedsim.fleet import Cost
from fedsim.graph import Inbox, everybody
from fedsim.sim.byzantine import Byzantine, Knowledge, held_back
from fedsim.sim.fleet import SimFleet
from fedsim.strategies.async_fedavg import AsyncFedAvg
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.scaffold import Scaffold
from fedsim.streams import Streams
from fedsim.tasks.models import logistic
from tests.build import Clocks, Play, build_fleet, digits_task, drawn, heard_sum, local_sgd


class Halves:
    """Client i sends (i + 1) times x."""

    def send(self, clients: Cohort, x: Tensor) -> dict[str, Tensor]:
        clients.memory["kept"] = x * (clients.ids[:, None] + 1)
        return {"v": x * (clients.ids[:, None] + 1), "n": clients.ids.double()}

    def gather(self, clients: Cohort, inbox: Inbox) -> dict[str, Tensor]:
        return {"sum": heard_sum(inbox, "v"), "own": inbox.own("v")}


HALVES = Halves()
X = torch.tensor([1.0, -2.0], dtype=torch.float64)


def _lies(ids: list[int], attack: Any) -> Byzantine:
    return Byzantine(ids=torch.tensor(ids), attack=attack, seed=0)


def _fleet(attack: Any, ids: list[int], n: int = 4, samples: list[int] | None = None, **options: Any) -> SimFleet:
    task = drawn(n, 2)
    if samples:
        task.num_examples = torch.tensor(samples)
    return build_fleet(task, HALVES, byzantine=_lies(ids, attack), width=2, **options)


def test_rows_of_the_byzantine_are_replaced_and_the_honest_left_alone() -> None:
    r = _fleet(InnerProduct(tau=2.0), [1]).ask(torch.arange(4), HALVES.send, x=X)
    mean = (1 + 3 + 4) / 3
    assert r["v"][:, 0].tolist() == pytest.approx([1, -2 * mean, 3, 4])
    assert r["n"].tolist() == [0, 1, 2, 3]  # only vectors are replaced


def test_an_attack_knows_all_honest_vectors_of_the_step_and_what_comes_of_its_own() -> None:
    seen = []

    class Curious(SignFlip):
        def __call__(self, honest: Tensor, b: int, streams: Streams, known: Knowledge) -> Tensor:
            assert known.rule is not None
            seen.append((honest[:, 0].tolist(), known.rule(torch.tensor([[100.0, 0.0], [300.0, 0.0]])).tolist()))
            return torch.tensor([[5.0, 5.0], [6.0, 6.0]])

    fleet = _fleet(Curious(), [1, 2])
    assert fleet.byzantine is not None
    fleet.byzantine.rule = lambda rows, ids: (ids + 1).double() @ rows
    r = fleet.ask(torch.tensor([3, 2, 1, 0]), HALVES.send, x=X)
    expected = 4 * 4 + 3 * 100 + 2 * 300 + 1 * 1  # each row in its client's place
    assert seen == [([4.0, 1.0], [expected, -2 * (16 + 1)])]
    assert r["v"][:, 0].tolist() == [4, 5, 6, 1]
    assert fleet.byzantine.known["v"].rule is None  # nothing that a checkpoint could not hold


def test_a_cohort_without_byzantine_clients_is_left_alone() -> None:
    r = _fleet(SignFlip(), [1]).ask(torch.tensor([0, 2]), HALVES.send, x=X)
    assert r["v"][:, 0].tolist() == [1, 3]


@pytest.mark.parametrize("attack", [SignFlip(), Alie(k=2.0), Silence()])
@pytest.mark.parametrize("weights", ["num_examples", "uniform"])
def test_a_fold_is_taken_after_the_replacement(attack: Any, weights: Any) -> None:
    samples = [1, 5, 2, 4]
    fold = Mean(weights=weights)
    r = _fleet(attack, [1, 3], samples=samples).ask(torch.arange(4), HALVES.send, fold=fold, x=X)
    apart = _fleet(attack, [1, 3], samples=samples).ask(torch.arange(4), HALVES.send, x=X)
    torch.testing.assert_close(r["v"], fold(apart["v"], apart.num_examples.double()), rtol=0, atol=1e-14)
    assert len(r) == len(apart) == (2 if isinstance(attack, Silence) else 4)


def test_the_silent_neither_reply_nor_cost_bits_nor_count() -> None:
    fleet = _fleet(Silence(), [0, 3])
    r = fleet.ask(torch.arange(4), HALVES.send, x=X)
    assert r.ids.tolist() == [1, 2] and r["v"][:, 0].tolist() == [2, 3] and r["n"].tolist() == [1, 2]
    assert len(r.arrived_at) == len(r.num_examples) == 2
    assert fleet.end_round().values()["num_clients"] == 2
    assert fleet.ledger.bits_up == 2 * (64 + 32) and fleet.ledger.bits_down == 4 * 64


def test_replies_that_are_received_are_replaced_too() -> None:
    fleet = _fleet(SignFlip(), [2], devices=Clocks((1.0, 2.0, 1.0, 3.0)))
    fleet.send(torch.arange(4), HALVES.send, x=X)
    r = fleet.receive(until=1.0)
    assert r.ids.tolist() == [0, 2] and r["v"][:, 0].tolist() == [1, -1]  # it saw the one that came with it
    assert fleet.receive()["v"][:, 0].tolist() == [2, 4]


def test_a_byzantine_client_that_arrives_alone_lies_about_its_own_vector() -> None:
    fleet = _fleet(InnerProduct(tau=3.0), [2], devices=Clocks((1.0, 2.0, 0.5, 3.0)))
    fleet.send(torch.arange(4), HALVES.send, x=X)
    r = fleet.receive(count=1)
    assert r.ids.tolist() == [2] and r["v"].tolist() == [[-9.0, 18.0]]


def test_attacks_reach_asynchronous_schemes_where_every_reply_comes_alone() -> None:
    task = drawn(4, 2)
    strategy = AsyncFedAvg(weights="identical", local=local_sgd(task, 0.01, steps=1))
    play = Play.start(task, strategy, byzantine=_lies([0], NotANumber()), devices=Clocks((1.0, 2.0, 3.0, 4.0)))
    assert bool(play.path(1).isnan().all())


def test_a_round_in_which_all_are_silent_changes_nothing() -> None:
    task = drawn(4, 2)
    for strategy in (FedAvg(cohort_size=1, local=local_sgd(task)), Scaffold(cohort_size=1, local=local_sgd(task))):
        play = Play.start(task, strategy, byzantine=_lies([0, 1, 2], Silence()))
        path = torch.cat([task.x0[None], play.path(12)])
        moved = (path[1:] != path[:-1]).any(1)
        assert path.shape == (13, 2) and bool(moved.any()) and not bool(moved.all())


def test_a_client_that_lies_remembers_what_it_honestly_did() -> None:
    fleet = _fleet(SignFlip(), [1])
    fleet.ask(torch.arange(4), HALVES.send, x=X)
    assert fleet.memory.of(torch.arange(4))["kept"][:, 0].tolist() == [1, 2, 3, 4]


def test_vectors_of_an_exchange_are_replaced_at_delivery() -> None:
    fleet = _fleet(InnerProduct(tau=1.0), [3])
    half = fleet.ask(torch.arange(4), HALVES.send, cost=Cost(vectors_up=0), x=X)
    assert half["v"][:, 0].tolist() == [1, 2, 3, 4]  # the replies stay with the clients until then
    out = fleet.exchange(half, HALVES.gather)
    assert out["sum"][:, 0].tolist() == pytest.approx([1 + 2 + 3 - 2] * 4)


def test_the_silent_send_nothing_in_an_exchange() -> None:
    fleet = _fleet(Silence(), [1])
    half = fleet.ask(torch.arange(4), HALVES.send, cost=Cost(vectors_up=0), x=X)
    down = fleet.ledger.bits_down
    out = fleet.exchange(half, HALVES.gather)
    assert out["sum"][:, 0].tolist() == [8, 10, 8, 8] and out["own"][:, 0].tolist() == [1, 2, 3, 4]
    assert fleet.ledger.bits_up == 3 * 3 * 64
    assert fleet.ledger.bits_down - down == (3 * 2 + 3) * 64  # the silent one still hears the three others


def test_an_adversary_always_arrives_and_so_does_a_clients_own_vector() -> None:
    n, f = 7, 2
    good = torch.ones(n, dtype=torch.bool)
    good[[2, 5]] = False
    ids = torch.arange(n)
    for job in range(20):
        graph = held_back(Streams(0, ids, torch.full_like(ids, job)), everybody(n), good, f)
        assert graph.counts.tolist() == [n - f] * n and graph.lost.tolist() == [f] * n
        heard = graph.dense(n)
        assert bool((heard[:, ~good] > 0).all()) and bool((heard.diagonal() > 0).all())
        torch.testing.assert_close(heard.sum(1), torch.ones(n).double(), rtol=0, atol=1e-12)


def test_what_is_told_to_one_peer_always_arrives_and_liars_tell_each_other_nothing() -> None:
    n, ids = 7, torch.arange(7)
    liar = _lies([2], Dissensus())
    for job in range(20):
        links = held_back(Streams(0, ids, torch.full_like(ids, job)), everybody(n), liar.honest(ids), 2)
        _, sent, heard = liar.tell(ids, {"v": torch.eye(n).double()}, links, 0)
        assert len(sent["v"]) == n + n - 1
        assert heard.hearers[heard.peers >= n].tolist() == [0, 1, 3, 4, 5, 6]


def test_knowledge_lasts_from_step_to_step_and_is_kept_apart_for_each_vector() -> None:
    lies = _lies([3], Mimic(warmup=2))
    fleet = build_fleet(drawn(4, 2), HALVES, byzantine=lies)
    for step in range(3):
        fleet.round = step
        r = fleet.ask(torch.arange(4), HALVES.send, x=X)
    assert set(lies.known) == {"v"} and lies.known["v"].step == 2
    assert r["v"][3].tolist() == r["v"][2].tolist()  # after the warm-up: the farthest along the common direction


def test_flipped_labels_poison_training_and_nothing_else() -> None:
    honest, poisoned = (digits_task(logistic, [30, 30]) for _ in range(2))
    poisoned.poison(torch.tensor([1]), LabelFlip())
    by_hand = digits_task(logistic, [30, 30])
    by_hand.data.targets[30:60] = 9 - by_hand.data.targets[30:60]
    local = local_sgd(honest, 0.1, epochs=1, steps=None, batch_size=8)
    lies = _lies([1], LabelFlip())
    strategy = FedAvg(local=local)
    got = Play.start(poisoned, strategy, byzantine=lies)
    expected = Play.start(by_hand, strategy)
    x = got.path(3)
    torch.testing.assert_close(x, expected.path(3), rtol=0, atol=0)
    assert not torch.equal(x, Play.start(honest, strategy).path(3))
    pool = got.fleet.executor.inner  # type: ignore[attr-defined]
    for measure in ("evaluate", "evaluate_clients"):
        ours, true = (getattr(task, measure)(x[-1], pool) for task in (poisoned, honest))
        for name in true:
            torch.testing.assert_close(torch.as_tensor(ours[name]), torch.as_tensor(true[name]), rtol=0, atol=0)


def test_two_fields_of_a_reply_are_each_attacked() -> None:
    task = drawn(4, 2)
    play = Play.start(task, Scaffold(local=local_sgd(task, 0.1, steps=2)), byzantine=_lies([0], SignFlip()))
    play.step()
    own = play.fleet.memory.of(torch.arange(4))["c"]
    honest = own[1:].mean(0)
    torch.testing.assert_close(play.state.c, (3 * honest - honest) / 4, rtol=0, atol=1e-12)
