"""Random draws and TPE: keyed, independent of who finishes first, and the latter better than the former."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from fedsim.sweep.search import Listed, Search, Tpe, random_settings
from fedsim.sweep.space import Choice, Method, Range, Setting

METHOD = Method("m", {"fixed": 1, "x": Range("uniform", -1, 1), "lr": Range("log", 1e-4, 1), "k": Choice(([1], [2]))})


def loss(setting: Setting) -> float:
    values = setting.values
    return (values["x"] - 0.3) ** 2 + (np.log10(values["lr"]) + 1) ** 2 / 4 + (values["k"] == [1])


def play(search: Search, *, in_flight: int, order: int = 0) -> list[Setting]:
    """All proposals, with some of them under way at a time, and finished in an order of their own."""
    rng = np.random.default_rng(order)
    asked: list[Setting] = []
    running: deque[Setting] = deque()
    while True:
        while len(running) < in_flight and (setting := search.next()) is not None:
            asked.append(setting)
            running.append(setting)
        if not running:
            return asked
        running.rotate(int(rng.integers(len(running))))
        done = running.popleft()
        search.tell(done, loss(done))


def test_random_draws_are_keyed_and_more_of_them_begin_alike() -> None:
    few, many = random_settings(METHOD, 5, seed=3).known(), random_settings(METHOD, 50, seed=3).known()
    assert many[:5] == few and random_settings(METHOD, 5, seed=4).known() != few
    assert few[0].overrides == {"fixed": 1, **few[0].values}
    xs, rates = np.array([[s.values["x"], np.log10(s.values["lr"])] for s in many]).T
    assert -1 <= xs.min() < -0.7 and 0.7 < xs.max() <= 1 and -4 <= rates.min() < -3.3 and -0.7 < rates.max() <= 0
    assert 10 < sum(s.values["k"] == [1] for s in many) < 40


def test_a_setting_that_is_drawn_twice_is_run_once() -> None:
    assert len(random_settings(Method("", {"k": Choice((1, 2))}), 20, seed=0).known()) == 2


def test_tpe_proposes_the_same_with_any_number_of_jobs_and_in_any_order() -> None:
    played = [
        play(Tpe(METHOD, 30, 0, ahead=4), in_flight=n, order=order) for n, order in ((1, 0), (4, 1), (4, 2), (9, 3))
    ]
    assert len(played[0]) == 30 and all(p == played[0] for p in played)
    assert play(Tpe(METHOD, 12, 0, ahead=4), in_flight=1) == played[0][:12]
    assert play(Tpe(METHOD, 12, 1, ahead=4), in_flight=1) != played[0][:12]


def test_tpe_is_never_further_ahead_than_it_may() -> None:
    search = Tpe(METHOD, 30, 0, ahead=3)
    first = [search.next() for _ in range(4)]
    assert all(first[:3]) and first[3] is None
    search.tell(first[1], 0.0)
    assert search.next() is None  # it waits for the first, which it is to be told before
    search.tell(first[0], 0.0)
    assert search.next() is not None and search.next() is not None and search.next() is None


def test_tpe_finds_better_settings_than_random_draws() -> None:
    def best(settings: list[Setting]) -> float:
        return float(np.mean(sorted(map(loss, settings))[:5]))

    wins = [
        best(play(Tpe(METHOD, 40, seed, ahead=2), in_flight=2)) < best(random_settings(METHOD, 40, seed).known())
        for seed in range(5)
    ]
    assert sum(wins) >= 4


def test_tpe_keeps_away_from_what_has_no_result() -> None:
    search = Tpe(Method("", {"lr": Range("log", 1e-4, 1)}), 60, 0, ahead=1)
    rates = []
    while (setting := search.next()) is not None:
        rates.append(setting.values["lr"])
        search.tell(setting, None if rates[-1] > 0.01 else -rates[-1])  # the best lies beside what diverges
    assert np.mean(np.array(rates[:10]) > 0.01) > 0.2 > np.mean(np.array(rates[-30:]) > 0.02)


def test_all_values_and_both_ends_are_checked_before_tpe_proposes() -> None:
    known = Tpe(Method("", {"a": Choice((1, 2, 3)), "b": Range("int", 1, 5)}), 9, 0, ahead=4).known()
    assert {s.values["a"] for s in known} == {1, 2, 3} and {s.values["b"] for s in known} == {1, 5}


def test_a_list_is_gone_through_in_its_order() -> None:
    settings = [Setting("", {"a": i}, {}) for i in range(3)]
    search = Listed(settings)
    assert search.known() == settings and [search.next() for _ in range(4)] == [*settings, None]


@pytest.mark.parametrize("value", [None, 1.0])
def test_results_do_not_matter_to_a_list(value: float | None) -> None:
    search = Listed([Setting("", {"a": 1}, {})])
    search.tell(search.known()[0], value)
    assert search.next() is not None
