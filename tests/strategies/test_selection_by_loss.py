"""Power-of-choice and Oort: worked out by hand, and what they cost and remember."""

from __future__ import annotations

from math import inf, log, nan, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.fleet import Replies
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff_stream import FedBuffStream
from fedsim.strategies.mime import Mime
from fedsim.strategies.selection import Among
from fedsim.strategies.selection.oort import Oort, quantile
from fedsim.strategies.selection.power_of_choice import PowerOfChoice
from fedsim.streams import server_rng
from fedsim.tasks.models import mlp
from tests.build import Clocks, Play, digits_task, local_sgd, quadratic, watched

VECTOR = 32  # bits of a model of one number


def cohorts(play: Play, seen: list[tuple[int, int, int]], rounds: int) -> list[list[int]]:
    """Who takes local steps in each of the next rounds."""
    out = []
    for _ in range(rounds):
        seen.clear()
        play.step()
        out.append(sorted({client for client, _, _ in seen}))
    return out


def replies(ids: list[int], losses: list[float], num_examples: list[int], seconds: list[float]) -> Replies:
    return Replies(
        torch.tensor(ids),
        torch.tensor(num_examples),
        torch.zeros(len(ids)),
        seconds=torch.tensor(seconds, dtype=torch.float64),
        logged={"train_loss": torch.tensor(losses, dtype=torch.float64)},
    )


# Power-of-choice -------------------------------------------------------------------------------------------------


def test_of_all_candidates_those_with_the_largest_loss_move_the_server() -> None:
    # f_i = (x - b_i)^2 / 2, and one step of rate 1 takes client i to b_i
    b = [0.0, 1.0, 5.0, 2.0]
    task = quadratic([1.0] * 4, b, 2.1, num_examples=[1, 3, 1, 1])
    strategy = FedAvg(cohort_size=2, selection=PowerOfChoice(candidates=4), local=local_sgd(task, 1.0, steps=1))
    play = Play.start(task, strategy)
    x = play.path(3)[:, 0].tolist()
    # at 2.1 the largest are 2 (2.9 away) and 0 (2.1); at 2.5 client 0 ties with 2 at 2.5; everything then stays
    assert x == pytest.approx([2.5, 2.5, 2.5])


def test_only_candidates_are_asked_and_the_largest_of_them_are_taken() -> None:
    losses = torch.tensor([3.0, nan, 1.0, 7.0, 5.0, inf, 2.0, 4.0], dtype=torch.float64)
    asked: list[list[int]] = []

    def at(ids: Tensor) -> Tensor:
        asked.append(ids.tolist())
        return losses[ids]

    value = losses.nan_to_num(nan=-1.0)
    for seed in range(30):
        among = Among(torch.arange(8), 2, torch.ones(8), 0, at)
        ids, _ = PowerOfChoice(candidates=4).choose({}, among, np.random.default_rng(seed))
        assert len(set(asked[-1])) == 4 and ids.tolist() == sorted(ids.tolist())
        best = sorted(asked[-1], key=lambda i: -float(value[i]))[:2]
        assert ids.tolist() == sorted(best)
    assert len({tuple(sorted(who)) for who in asked}) > 10


def test_candidates_are_drawn_in_proportion_to_samples() -> None:
    counts, rng = np.zeros(3), np.random.default_rng(0)
    among = Among(torch.arange(3), 1, torch.tensor([1, 3, 6]), 0, lambda ids: torch.zeros(len(ids)))
    for _ in range(10_000):
        counts[PowerOfChoice(candidates=1).choose({}, among, rng)[0]] += 1
    assert counts / 10_000 == pytest.approx([0.1, 0.3, 0.6], abs=0.02)


def test_of_equal_losses_nobody_is_preferred() -> None:
    counts, rng = np.zeros(4), np.random.default_rng(0)
    among = Among(torch.arange(4), 1, torch.ones(4), 0, lambda ids: torch.zeros(len(ids)))
    for _ in range(8000):
        counts[PowerOfChoice(candidates=4).choose({}, among, rng)[0]] += 1
    assert counts / 8000 == pytest.approx([0.25] * 4, abs=0.02)


def test_asking_costs_the_model_down_a_number_up_and_a_third_of_a_pass() -> None:
    task = quadratic([1.0] * 5, [0.0] * 5, 1.0)
    strategy = FedAvg(cohort_size=2, selection=PowerOfChoice(candidates=4), local=local_sgd(task, 0.1, steps=6))
    play = Play.start(task, strategy)
    play.step()
    ledger = play.fleet.ledger
    assert (ledger.bits_down, ledger.bits_up) == ((4 + 2) * VECTOR, 4 * 32 + 2 * VECTOR)
    assert play.fleet.now == pytest.approx(0.01 / 3 + 6 * 0.01)
    assert play.seen["num_clients"] == 2, "those that train, and not the candidates"


def test_whoever_does_not_answer_by_the_deadline_is_not_chosen_and_costs_no_answer() -> None:
    """Client 3 has by far the largest loss, and takes too long to say so."""
    task = quadratic([1.0] * 4, [0.0, 1.0, 2.0, 9.0], 0.0)
    chooser = PowerOfChoice(candidates=4)
    strategy = FedAvg(cohort_size=2, deadline=3.0, selection=chooser, local=local_sgd(task, 0.1, steps=2))
    play = Play.start(task, strategy, devices=Clocks((1.0, 1.0, 1.0, 4.0)))
    play.step()
    assert play.fleet.job_counts.tolist() == [1, 2, 2, 1], "a question each, and work for the largest losses known"
    assert play.fleet.now == 3.0 + 1.0, "the question has the whole deadline by itself, and so has the work"
    assert play.fleet.ledger.bits_up == 3 * 32 + 2 * VECTOR and play.fleet.ledger.bits_down == (4 + 2) * VECTOR
    assert (play.seen["num_clients"], play.seen["num_late"]) == (2, 0)
    assert not play.fleet.sent and play.fleet.num_at_work == 0


def test_the_loss_that_is_asked_for_is_that_of_all_data_in_pieces() -> None:
    task = digits_task(mlp, [700, 30, 0])
    strategy = FedAvg(local=local_sgd(task, 0.1, epochs=1, steps=None, batch_size=10))
    play = Play.start(task, strategy)
    x = task.init(0)
    got = strategy.losses_at(play.fleet, x, torch.tensor([2, 0, 1]))
    expected = task.evaluate_clients(x, play.fleet.executor.inner)["loss"]  # type: ignore[attr-defined]
    assert got[1:].tolist() == pytest.approx(expected[:2].tolist(), rel=1e-5) and float(got[0]) == 0.0


def test_remembered_losses_are_those_of_the_last_jobs_and_new_clients_come_first() -> None:
    b = [0.0, 1.0, 5.0, 2.0]
    task = quadratic([1.0] * 4, b, 2.1)
    seen = watched(task)
    chooser = PowerOfChoice(candidates=4, losses="remembered")
    play = Play.start(task, FedAvg(cohort_size=2, selection=chooser, local=local_sgd(task, 1e-9, steps=1)))
    who = cohorts(play, seen, 5)
    assert sorted(who[0] + who[1]) == [0, 1, 2, 3] and who[2:] == [[0, 2]] * 3
    assert play.state.known["loss"].tolist() == pytest.approx([(2.1 - at) ** 2 / 2 for at in b], abs=1e-6)
    assert play.fleet.ledger.bits_up == 5 * 2 * VECTOR, "nobody was asked"


# Oort ------------------------------------------------------------------------------------------------------------


def known(**changes: Any) -> dict[str, Tensor]:
    out = dict(Oort(fast=0.5).start(4, 1))
    out["utility"] = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    out["seconds"] = torch.tensor([1.0, 1.0, 4.0, 2.0], dtype=torch.float64)
    out["last"] = torch.tensor([1, 2, 3, 4])
    return out | changes


def test_scores_are_utility_and_a_bonus_for_waiting_times_a_penalty_for_slowness() -> None:
    scores = Oort(fast=0.5, clip=1.0).scores(known(), torch.arange(4), 5)
    # sqrt(0.1 log 5) = 0.401178; T = 2 seconds, and client 2 takes 4
    expected = [0.401178, 1 / 3 + 0.283676, (2 / 3 + 0.231620) / 4, 1 + 0.200589]
    assert scores.tolist() == pytest.approx(expected, abs=2e-6)
    assert Oort(clip=1.0, alpha=0.0).scores(known(), torch.tensor([2]), 5).item() == pytest.approx(
        sqrt(0.1 * log(5) / 3)
    )


def test_utilities_are_cut_at_a_quantile() -> None:
    bonus = [sqrt(0.1 * log(5) / last) for last in (1, 2, 3, 4)]
    scores = Oort(alpha=0.0, clip=0.5).scores(known(), torch.arange(4), 5)  # at 30
    assert scores.tolist() == pytest.approx([0 + bonus[0], 0.5 + bonus[1], 1 + bonus[2], 1 + bonus[3]])
    assert quantile(torch.arange(100.0), 0.95) == 95.0 and quantile(torch.arange(3.0), 1.0) == inf


def test_utility_is_samples_times_loss_and_the_rest_is_noted() -> None:
    before = Oort().start(4, 2)
    after = Oort().noted(before, replies([3, 1], [0.5, 2.0], [3, 2], [7.0, 9.0]), 4)
    assert after["utility"].tolist() == [0, 4, 0, 1.5] and after["seconds"].tolist() == [0, 9, 0, 7]
    assert after["last"].tolist() == [0, 5, 0, 5] and float(after["useful"][1]) == 5.5
    assert before["utility"].tolist() == [0] * 4, "the state before stays as it was"
    assert Oort().noted(before, replies([3], [nan], [3], [1.0]), 0)["utility"].tolist() == [0] * 4


def test_the_best_are_drawn_from_those_who_score_almost_as_much_as_the_last_of_them() -> None:
    scores = torch.tensor([1.0, 0.97, 0.5, 0.96, 0.1], dtype=torch.float64)
    taken = {tuple(sorted(Oort().exploited(scores, 2, np.random.default_rng(k)).tolist())) for k in range(60)}
    assert taken == {(0, 1), (0, 3), (1, 3)}
    only = {tuple(Oort(cutoff=1.0).exploited(scores, 1, np.random.default_rng(k)).tolist()) for k in range(20)}
    assert only == {(0,)}


def test_new_clients_come_as_often_as_epsilon_says_until_none_is_left() -> None:
    task = quadratic([1.0] * 100, [float(k) for k in range(100)], 0.0)
    seen = watched(task)
    chooser = Oort(epsilon=0.8, epsilon_decay=0.5, epsilon_least=0.3)
    play = Play.start(task, FedAvg(cohort_size=10, selection=chooser, local=local_sgd(task, steps=1)))
    met, fresh = set[int](), []
    for who in cohorts(play, seen, 40):
        assert len(who) == 10
        fresh.append(len(set(who) - met))
        met |= set(who)
    assert fresh[:5] == [10, 4, 3, 3, 3] and met == set(range(100)) and fresh[-1] == 0


def test_slow_clients_are_left_once_they_are_known() -> None:
    task = quadratic([1.0] * 10, [float(k % 2) for k in range(10)], 5.0)
    seen = watched(task)
    chooser = Oort(epsilon_decay=0.9, epsilon_least=0.0, fast=0.6)
    strategy = FedAvg(cohort_size=3, selection=chooser, local=local_sgd(task, 0.01, steps=1))
    who = cohorts(Play.start(task, strategy, devices=Clocks((1.0,) * 7 + (50.0,) * 3)), seen, 40)
    met = [set().union(*who[: k + 1]) for k in range(40)]
    known_by = next(k for k in range(40) if len(met[k]) == 10)
    assert known_by < 30 and not {7, 8, 9} & set().union(*who[known_by + 1 :])


def test_the_pacer_lets_slower_clients_in_when_the_window_was_less_useful() -> None:
    oort = Oort(window=2, fast=0.3, pace=0.1)
    state = oort.start(2, 1)
    fast = []
    for round, loss in enumerate([4.0, 4.0, 3.0, 3.0, 5.0, 5.0, 1.0, 1.0]):
        state = oort.noted(state, replies([0], [loss], [1], [1.0]), round)
        fast.append(float(state["fast"]))
    assert fast == pytest.approx([0.3, 0.3, 0.3, 0.4, 0.4, 0.4, 0.4, 0.5])
    assert float(state["useful"][0]) == 2.0 and float(state["useful"][1]) == 0.0


def test_a_streaming_server_learns_from_every_arrival() -> None:
    task = quadratic([1.0] * 6, [float(k) for k in range(6)], 9.0)
    strategy = FedBuffStream(buffer_size=2, concurrency=3, selection=Oort(), local=local_sgd(task, 0.01, steps=2))
    play = Play.start(task, strategy, devices=Clocks((1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    for _ in range(10):
        play.step()
    last, seconds = play.state.known["last"], play.state.known["seconds"]
    assert int((last > 0).sum()) >= 4 and int(last.max()) == 10
    assert seconds[last > 0].tolist() == [1.0 + i for i in range(6) if last[i]]


class Silent(FedAvg):
    """FedAvg whose clients say nothing of their losses."""

    def local_update(self, clients: Cohort, x: Tensor, state: Tensor | None = None) -> Any:
        return {"delta": torch.zeros(len(clients), len(x), dtype=x.dtype)}


def test_work_in_two_halves_is_judged_as_a_whole() -> None:
    task = quadratic([1.0] * 3, [0.0, 1.0, 2.0], 4.0, num_examples=[1, 2, 3])
    strategy = Mime(selection=Oort(epsilon=0.0), local=local_sgd(task, 0.1, steps=1))
    play = Play.start(task, strategy, devices=Clocks((1.0, 2.0, 4.0)))
    play.step()
    assert play.state.known["seconds"].tolist() == [2.0, 4.0, 8.0], "a full gradient, and a step"
    expected = [n * (4.0 - b) ** 2 / 2 for n, b in ((1, 0.0), (2, 1.0), (3, 2.0))]
    assert play.state.known["utility"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("chooser", [Oort(), PowerOfChoice(candidates=2, losses="remembered")])
def test_clients_that_log_no_loss_cannot_be_chosen_by_it(chooser: Any) -> None:
    task = quadratic([1.0] * 3, [0.0] * 3, 1.0)
    play = Play.start(task, Silent(cohort_size=1, selection=chooser, local=local_sgd(task)))
    with pytest.raises(
        ValueError, match="learns from the losses of clients' training, and this strategy's clients log"
    ):
        play.step()


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"epsilon": 1.1}, "epsilon is a share"),
        ({"fast": -0.1}, "fast is a share"),
        ({"clip": nan}, "clip is a share"),
        ({"alpha": -1.0}, "alpha must not be negative"),
        ({"window": 0}, "window must be at least 1 round"),
    ],
)
def test_settings_of_oort_out_of_range_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Oort(**bad)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates must be at least 1, got 0"):
        PowerOfChoice(candidates=0)


def test_the_rounds_generator_alone_decides() -> None:
    among = Among(torch.arange(4), 2, torch.ones(4), 5, lambda ids: torch.zeros(len(ids)))
    for chooser in (Oort(), PowerOfChoice(candidates=3)):
        one, two, other = (chooser.choose(known(), among, server_rng(s, "server"))[0].tolist() for s in (0, 0, 3))
        assert one == two and len(other) == 2
