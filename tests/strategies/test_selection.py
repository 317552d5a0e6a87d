"""Who takes part: chances as claimed, weights that make up for them, turns, and who is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.aggregate import Mean, Median
from fedsim.aggregate.coordinatewise import TrimmedMean
from fedsim.compose import compose
from fedsim.config import ConfigError
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff_stream import FedBuffStream
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.selection import SELECTIONS, Among, Selection, Uniform
from fedsim.strategies.selection.base import drawn
from fedsim.strategies.selection.chances import BySamples, Fixed, chances, places, systematic
from fedsim.strategies.selection.cyclic import Cyclic
from fedsim.streams import server_rng
from tests.build import Clocks, Play, local_sgd, quadratic, rows_of, two_clients, watched

SAMPLES = [1, 2, 3, 6, 4]
V = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0], dtype=torch.float64)


def among(count: int, clients: list[int] | None = None, samples: list[int] = SAMPLES, round: int = 0) -> Among:
    ids = torch.arange(len(samples)) if clients is None else torch.tensor(clients)
    return Among(ids, count, torch.tensor(samples), round, lambda ids: pytest.fail("nobody is to be asked"))


def outcomes(pi: Tensor) -> dict[tuple[int, ...], float]:
    """{those drawn: chance}, by going through all orders and all stretches of the start in which nothing changes."""
    found: dict[tuple[int, ...], float] = {}
    orders = list(permutations(range(len(pi))))
    for order in orders:
        ends = np.cumsum([pi[i] for i in order if pi[i] < 1])
        cuts = np.unique(np.round([0.0, *(ends % 1.0), 1.0], 13))
        for low, high in pairwise(cuts):
            who = tuple(places(pi, np.array(order), (low + high) / 2).tolist())
            found[who] = found.get(who, 0.0) + (high - low) / len(orders)
    return found


# Chances and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", [BySamples(), Fixed(probabilities=(0.1, 0.15, 0.2, 0.5, 0.05))], ids=["n", "p"])
@pytest.mark.parametrize("fold", [Mean(), Mean(weights="uniform")], ids=["by samples", "uniform"])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("present", [None, [0, 2, 3, 4]])
def test_the_expected_sum_is_the_mean_over_all_who_are_there(
    selection: Any, fold: Mean, size: int, present: list[int] | None
) -> None:
    here = among(size, present)
    pi = selection.chances(here)
    drawn_ = outcomes(pi)
    assert sum(drawn_.values()) == pytest.approx(1.0) and {len(who) for who in drawn_} == {size}
    for place in range(len(pi)):
        chance = sum(p for who, p in drawn_.items() if place in who)
        assert chance == pytest.approx(float(pi[place]), abs=1e-12)
    expected = 0.0
    for who, p in drawn_.items():
        ids = here.clients[list(who)]
        expected += p * float(selection.weights(fold, here, ids) @ V[ids])
    mean = fold(V[here.clients][:, None], here.num_examples[here.clients].double())
    assert expected == pytest.approx(float(mean), abs=1e-12)


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ([1.0, 1.0, 2.0], 2, [0.5, 0.5, 1.0]),
        ([1.0, 2.0, 3.0, 6.0], 2, [1 / 6, 2 / 6, 3 / 6, 1.0]),
        ([1.0, 1.0, 3.0, 30.0], 3, [0.5, 0.5, 1.0, 1.0]),  # the third's chance exceeds 1 once the fourth's is cut
        ([0.0, 2.0, 2.0], 1, [0.0, 0.5, 0.5]),
        ([0.0, 2.0, 0.0], 2, [0.0, 1.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], 2, [0.5, 0.5, 0.5, 0.5]),
        ([4.0, 5.0], 2, [1.0, 1.0]),
    ],
)
def test_chances_are_proportional_up_to_one(sizes: list[float], count: int, expected: list[float]) -> None:
    assert chances(torch.tensor(sizes), count).tolist() == pytest.approx(expected, abs=1e-15)


def test_draws_come_as_often_as_their_chances_say() -> None:
    pi, rng, n = chances(torch.arange(1.0, 31.0), 7), np.random.default_rng(0), 20_000
    counts = np.zeros(30)
    for _ in range(n):
        who = systematic(pi, rng)
        assert len(who) == 7 and bool((who.diff() > 0).all())
        counts[who] += 1
    p = pi.numpy()
    assert np.abs((counts - n * p) / np.sqrt(n * p * (1 - p))).max() < 4.5


def test_draws_one_after_the_other_have_the_law_of_an_urn() -> None:
    w, rng, n = torch.tensor([1.0, 2.0, 3.0, 4.0]) / 10, np.random.default_rng(1), 40_000
    first, both = np.zeros(4), np.zeros(4)
    for _ in range(n):
        who = drawn(w, 2, rng).numpy()
        first[who[0]] += 1
        both[who] += 1
    p = w.numpy()
    second = np.array([sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)])
    for seen, chance in ((first, p), (both, p + second)):
        assert np.abs((seen - n * chance) / np.sqrt(n * chance * (1 - chance))).max() < 4.5


def test_who_has_no_weight_is_drawn_last() -> None:
    for seed in range(50):
        who = drawn(torch.tensor([0.0, 1e-9, 0.0, 5.0]), 3, np.random.default_rng(seed)).tolist()
        assert set(who[:2]) == {1, 3} and who[2] in (0, 2)


def test_a_drawn_client_counts_by_its_weight_over_its_chance() -> None:
    # one step of rate 1 on a = 1 takes client i to b_i, so the server moves by the sum of w_i (x - b_i)
    task = quadratic([1.0] * 4, [1.0, 2.0, 4.0, 8.0], 0.5, num_examples=[1, 2, 3, 6])
    p, pi = [1 / 12, 2 / 12, 3 / 12, 6 / 12], [1 / 6, 2 / 6, 3 / 6, 1.0]
    seen = watched(task)
    play = Play.start(task, FedAvg(cohort_size=2, selection=BySamples(), local=local_sgd(task, 1.0, steps=1)))
    x, cohorts = 0.5, set()
    for _ in range(12):
        seen.clear()
        play.step()
        who = sorted({i for i, _, _ in seen})
        cohorts.add(tuple(who))
        assert len(who) == 2 and 3 in who
        x -= sum(p[i] / pi[i] * (x - (1.0, 2.0, 4.0, 8.0)[i]) for i in who)
        assert float(play.state.x) == pytest.approx(x, abs=1e-12)
    assert len(cohorts) == 3


def test_the_uniform_selection_is_the_draw_that_it_always_was() -> None:
    for seed in range(5):
        got, _ = Uniform().choose({}, among(3), server_rng(seed, "server"))
        expected = np.sort(server_rng(seed, "server").choice(5, size=3, replace=False))
        assert got.tolist() == expected.tolist()


# Turns -----------------------------------------------------------------------------------------------------------


def turns(selection: Cyclic, rounds: int, size: int = 2, absent: Callable[[int], set[int]] = lambda k: set()) -> Any:
    known, out = selection.start(5, size), []
    for k in range(rounds):
        here = [i for i in range(5) if i not in absent(k)]
        ids, known = selection.choose(known, among(min(size, len(here)), here), np.random.default_rng(k))
        out.append(ids.tolist())
    return out


def test_groups_take_turns_in_the_order_of_their_ids() -> None:
    assert turns(Cyclic(), 5) == [[0, 1], [2, 3], [4], [0, 1], [2, 3]]


def test_shuffled_cycles_differ_and_hold_everybody_once() -> None:
    found = turns(Cyclic(shuffle=True), 12)
    cycles = [found[k : k + 3] for k in range(0, 12, 3)]
    assert all(sorted(i for group in cycle for i in group) == [0, 1, 2, 3, 4] for cycle in cycles)
    assert len({str(cycle) for cycle in cycles}) > 1


def test_who_is_away_misses_the_turn_and_nobody_else_does() -> None:
    assert turns(Cyclic(), 4, absent=lambda k: {0, 2} if k == 0 else set()) == [[1, 3], [4], [0, 1], [2, 3]]
    assert turns(Cyclic(), 3, absent=lambda k: {3, 4} if k == 1 else set()) == [[0, 1], [2], [3, 4]]


@pytest.mark.parametrize(
    "options, clocks",
    [({"deadline": 2.0}, (9.0, 9.0, 9.0, 1.0, 1.0)), ({"aggregator": TrimmedMean(f=1)}, (1.0,) * 5)],
    ids=["all of a group are late", "the last group is too small"],
)
def test_the_turn_passes_on_from_a_group_that_moves_nothing(options: dict[str, Any], clocks: Any) -> None:
    task = quadratic([1.0] * 5, [0.0, 1.0, 2.0, 3.0, 4.0], 9.0, num_examples=SAMPLES)
    strategy = FedAvg(cohort_size=3, selection=Cyclic(), local=local_sgd(task, steps=1), **options)
    play = Play.start(task, strategy, devices=Clocks(clocks))
    few = ["too_few" in play.step() for _ in range(6)]
    assert sum(few) == 3 and play.fleet.job_counts.tolist() == [3] * 5


# In a server -----------------------------------------------------------------------------------------------------

MANY: dict[str, Any] = {
    "fixed": {"probabilities": (0.1, 0.15, 0.2, 0.5, 0.05)},
    "power_of_choice": {"candidates": 4},
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_of_fewer_clients_than_wanted_all_take_part(name: str) -> None:
    task = quadratic([1.0] * 5, [0.0, 1.0, 2.0, 3.0, 4.0], 9.0, num_examples=SAMPLES)
    selection = SELECTIONS[name](**MANY.get(name, {}))
    play = Play.start(task, FedAvg(cohort_size=3, selection=selection, local=local_sgd(task, steps=1)))
    play.step()
    play.fleet.present = lambda at_least=1: torch.tensor([1, 4])  # type: ignore[method-assign]
    before = play.fleet.job_counts.clone()
    play.step()
    worked = (play.fleet.job_counts > before).nonzero().flatten().tolist()
    assert worked == ([4] if name == "cyclic" else [1, 4])  # client 1 had its turn


@pytest.mark.parametrize("name", SELECTIONS)
def test_without_a_size_everybody_takes_part_whoever_chooses(name: str) -> None:
    task = quadratic([1.0] * 5, [0.0, 1.0, 2.0, 3.0, 4.0], 9.0, num_examples=SAMPLES)
    many = {**MANY, "power_of_choice": {"candidates": 5}}.get(name, {})
    local = local_sgd(task, steps=2)
    paths = [
        Play.start(task, FedAvg(selection=chooser, local=local)).path(3)
        for chooser in (SELECTIONS[name](**many), Uniform())
    ]
    torch.testing.assert_close(paths[0], paths[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Fixed(probabilities=(0.5, 0.6)), "must sum to 1, these sum to 1.1"),
        (lambda: Fixed(probabilities=(1.0, 0.0)), "must all be positive, got 0"),
        (lambda: Fixed(probabilities=(float("nan"), 1.0)), "must all be positive"),
        (lambda: Fixed(probabilities=(0.5, 0.5)).start(3, 1), "got 2 probabilities for 3 clients"),
        (lambda: FedAvg(selection=BySamples(), aggregator=Median(), local=LOCAL), "counts each once"),
        (lambda: FedAvg(selection=BySamples(), cohort_size=2, over_select=1.5, local=LOCAL), "change by who is fast"),
        (lambda: FedAvg(selection=BySamples(), cohort_size=2, deadline=1.0, local=LOCAL), "change by who is fast"),
        (lambda: Scaffold(selection=BySamples(), local=LOCAL), "more of replies than their weighted sum"),
        (lambda: FedBuffStream(selection=BySamples(), local=LOCAL), "more of replies than their weighted sum"),
        (
            lambda: FedBuffStream(selection=SELECTIONS["power_of_choice"](candidates=2), local=LOCAL),  # type: ignore[call-arg]
            "replaced at once, without asking others",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LOCAL = local_sgd(two_clients())
CONFIG: dict[str, Any] = {
    "rounds": 4,
    "task": {"name": "classification", "dataset": "digits", "model": "logistic"},
    "clients": {"count": 5},
    "local": {"steps": 1, "batch_size": 4, "optimizer": {"name": "sgd", "lr": 0.1}},
    "runtime": {"workers": 1},
}


def fedavg(**selection: Any) -> dict[str, Any]:
    return {"strategy": {"name": "fedavg", "cohort_size": 2, "selection": selection}}


@pytest.mark.parametrize(
    "changes, message",
    [
        (fedavg(name="fixed", probabilities=[0.5, 0.5]), "strategy.selection: got 2 probabilities for 5 clients"),
        (fedavg(name="fixed", probabilities=[0.5, 0.4]), "strategy.selection: probabilities must sum to 1"),
        (fedavg(name="fixed"), "strategy.selection.probabilities: missing"),
        (fedavg(name="power_of_choice", candidates=6), "strategy.selection: candidates=6 must lie between the 2"),
        (fedavg(name="power_of_choice", candidates=1), "strategy.selection: candidates=1 must lie between the 2"),
        (fedavg(name="ort"), "strategy.selection.name: unknown name 'ort'; did you mean 'oort'"),
        (fedavg(name="oort", cutoff=1.5), "strategy.selection: cutoff is a share and must lie in"),
        ({"strategy": {"name": "fedfix", "interval": 1.0, "selection": "oort"}}, "every client with data is at work"),
        ({"strategy": {"name": "dsgd", "selection": "oort"}}, "peers average among themselves"),
        ({"strategy": {"name": "masha1", "lr": 0.1, "selection": "oort"}}, "its mean operator would be another"),
        (
            {**fedavg(name="by_samples"), "task": {**CONFIG["task"], "model": "resnet_bn"}},
            "strategy.selection: BySamples gives replies weights that add up to one on average only, and buffers",
        ),
        (
            {
                **fedavg(name="by_samples"),
                "local": {"steps": 1, "optimizer": {"name": "adam", "lr": 0.1, "state_scope": "server"}},
            },
            "and states (local.optimizer.state_scope: server) need a mean every time",
        ),
    ],
)
def test_a_file_that_asks_for_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose({**CONFIG, **changes}, "x.yaml").close()
    assert message in str(caught.value)


def test_the_plan_names_the_selection_and_the_resolved_file_all_its_settings() -> None:
    composition = compose({**CONFIG, **fedavg(name="power_of_choice", candidates=3)}, "x")
    composition.close()
    assert composition.plan["selection"] == "power_of_choice (candidates 3, losses asked)"
    section = composition.resolved["strategy"]["selection"]
    assert section == {"name": "power_of_choice", "candidates": 3, "losses": "asked"}
    plain = compose({**CONFIG, "strategy": "fedavg"}, "x")
    plain.close()
    assert plain.plan["selection"] == "uniform"


@pytest.mark.parametrize("name", sorted(set(SELECTIONS) - {"uniform"}))
def test_every_selection_changes_who_takes_part_and_trains(name: str) -> None:
    many = {**MANY, "fixed": {"probabilities": [0.1, 0.15, 0.2, 0.5, 0.05]}}.get(name, {})
    raw = {**CONFIG, "partition": {"name": "dirichlet", "alpha": 0.3}, "rounds": 12, "evaluate": {"every": 1}}
    plain, rows = (rows_of({**raw, **fedavg(**section)}) for section in ({"name": "uniform"}, {"name": name, **many}))
    assert [r["train_loss"] for r in rows] != [r["train_loss"] for r in plain]
    assert rows[-1]["test_loss"] < rows[0]["test_loss"]


def test_every_selection_is_one() -> None:
    assert all(issubclass(kind, Selection) for kind in SELECTIONS.values())
