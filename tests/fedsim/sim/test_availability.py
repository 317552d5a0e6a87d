"""When clients can be reached: each law says what it claims, at any time, in any order."""

from __future__ import annotations

from math import exp, inf
from typing import Any

import pytest
import torch

from fedsim.sim import availability
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.availability import Always, Availability, Bernoulli, Diurnal, Markov
from fedsim.streams import Streams

LAWS: list[Availability] = [
    Bernoulli(p=0.4, seconds=0.7),
    Diurnal(period=7.3, share=0.3),
    Diurnal(period=5.0, share=0.9, spread=0.4),
    Markov(on_seconds=3.0, off_seconds=1.0),
]
IDS = torch.arange(400)
every_law = pytest.mark.parametrize("law", LAWS, ids=[type(law).__name__ for law in LAWS])


@every_law
def test_a_client_stays_as_it_is_until_the_change_that_was_foretold(law: Availability) -> None:
    for i in range(5):
        client, now = IDS[i : i + 1], 0.0
        for _ in range(8):
            on, then = bool(law.on_line(1, client, now)), float(law.changes(1, client, now, inf))
            assert then > now and bool(law.on_line(1, client, then)) is not on
            between = torch.linspace(now, then, 6, dtype=torch.float64)[1:-1]
            assert all(bool(law.on_line(1, client, float(t))) is on for t in between)
            now = then


@every_law
def test_what_is_told_of_a_client_depends_on_seed_client_and_time_alone(law: Availability) -> None:
    whole = law.on_line(3, IDS, 4.2)
    law.on_line(3, IDS, 99.0)
    assert torch.equal(law.on_line(3, IDS.flip(0), 4.2).flip(0), whole)
    assert torch.equal(law.on_line(3, IDS[7:9], 4.2), whole[7:9])
    if not (isinstance(law, Diurnal) and law.spread < 1):
        assert not torch.equal(law.on_line(4, IDS, 4.2), whole)
    within, ever = law.changes(3, IDS, 4.2, 5.0), law.changes(3, IDS, 4.2, inf)
    assert torch.equal(within[ever < 5.0], ever[ever < 5.0]) and 0 < int((ever < 5.0).sum()) < len(IDS)
    assert bool((within[ever >= 5.0] >= 5.0).all())


def test_slots_are_independent() -> None:
    law, ids = Bernoulli(p=0.3, seconds=2.0), torch.arange(20_000)
    on = torch.stack([law.on_line(0, ids, t) for t in (0.0, 1.9, 2.0, 4.0)]).double()
    assert torch.equal(on[0], on[1])
    assert float(on.mean()) == pytest.approx(0.3, abs=0.01)
    assert float((on[2] * on[3]).mean()) == pytest.approx(0.09, abs=0.01)


def test_a_day_has_its_share_and_begins_when_it_does() -> None:
    together, apart = Diurnal(period=10.0, share=0.3, spread=0.0), Diurnal(period=10.0, share=0.3)
    shares = [float(together.on_line(0, IDS, t).double().mean()) for t in (0.0, 2.9, 3.0, 9.9, 10.0, 1e6 + 13.0)]
    assert shares == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert together.changes(0, IDS[:1], 0.0, inf).item() == pytest.approx(3.0)
    assert together.changes(0, IDS[:1], 3.0, inf).item() == pytest.approx(10.0)
    for t in (0.0, 4.0, 77.0):
        assert float(apart.on_line(0, torch.arange(20_000), t).double().mean()) == pytest.approx(0.3, abs=0.015)
    assert bool(Diurnal(share=1.0).changes(0, IDS, 5.0, inf).isinf().all())


def test_a_chain_comes_and_goes_after_exponential_times_of_the_right_means() -> None:
    """The law of a chain of two states: its share, its correlation over time and its times to the next change."""
    law, ids = Markov(on_seconds=30.0, off_seconds=10.0), torch.arange(4000)
    on = torch.stack([law.on_line(1, ids, float(t)) for t in range(0, 100, 5)]).double()
    assert float(on.mean()) == pytest.approx(0.75, abs=0.01) and float(on[0].mean()) == pytest.approx(0.75, abs=0.03)
    for lag in (1, 2):
        together = ((on[:-lag] - 0.75) * (on[lag:] - 0.75)).mean() / (0.75 * 0.25)
        assert float(together) == pytest.approx(exp(-5 * lag * (1 / 30 + 1 / 10)), abs=0.03)
    here, left = law.on_line(1, ids, 50.0), law.changes(1, ids, 50.0, inf) - 50.0
    for state, mean in ((here, 30.0), (~here, 10.0)):
        assert float(left[state].mean()) == pytest.approx(mean, rel=0.08)
        assert float((left[state] > mean).double().mean()) == pytest.approx(exp(-1), abs=0.03)


@pytest.mark.parametrize(
    "make, kwargs, words",
    [
        (Bernoulli, {"p": 0.0}, "p must be a probability in"),
        (Bernoulli, {"p": 1.1}, "p must be a probability in"),
        (Bernoulli, {"p": 0.5, "seconds": 0.0}, "seconds must be positive"),
        (Diurnal, {"share": 0.0}, "share must lie in"),
        (Diurnal, {"spread": 1.5}, "spread is a part of the period"),
        (Diurnal, {"period": inf}, "period must be positive"),
        (Markov, {"on_seconds": -1.0, "off_seconds": 1.0}, "on_seconds must be positive"),
        (Dropout, {"probability": 1.0}, r"probability must lie in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, kwargs: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**kwargs)


# Waiting ---------------------------------------------------------------------------------------------------------


def test_waiting_ends_at_the_first_moment_at_which_enough_are_there() -> None:
    law = Bernoulli(p=0.4, seconds=1.0)
    slots = [int(law.on_line(0, IDS[:10], float(t)).sum()) for t in range(200)]
    most = max(slots)
    first, start = slots.index(most), Absence(availability=law)
    assert first > 1, "the seed must make it wait"
    now, on = start.wait(IDS[:10], 0.5, most)
    assert now == first and int(on.sum()) == most
    assert start.wait(IDS[:10], 0.5, 0)[0] == 0.5


@pytest.mark.parametrize("law", [Bernoulli(p=1e-15, seconds=1.0), Markov(on_seconds=1e-6, off_seconds=1e9)])
def test_whoever_hardly_ever_comes_is_not_waited_for_for_ever(
    law: Availability, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "MOST", 20_000)
    assert law.changes(0, IDS[:7], 3.0, inf).isinf().all()
    with pytest.raises(ValueError, match="1 of 7 clients are needed at once .* nobody comes any more; change clients"):
        Absence(availability=law).wait(IDS[:7], 0.0, 1)


def test_the_change_of_one_client_is_found_far_ahead_as_slot_by_slot() -> None:
    law, client = Bernoulli(p=0.002, seconds=0.5), IDS[:1]
    slots = Streams(9, torch.zeros(20_000, dtype=torch.int64), torch.arange(20_000))
    on = slots.uniform("availability", 1, dtype=torch.float64)[:, 0] < 0.002
    comes = [k for k in range(1, 20_000) if on[k] and not on[k - 1]]
    assert len(comes) > 10
    now = 0.0
    for k in comes:
        assert float(law.changes(9, client, now, inf)) == 0.5 * k
        assert float(law.changes(9, client, now, 0.5 * k)) == inf, "not there yet"
        now = float(law.changes(9, client, 0.5 * k, inf))  # when it leaves again


def test_waiting_for_more_than_are_ever_there_says_how_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="3 of 2 clients are needed at once from second 0 on, where 2 are on line at m"
    ):
        Absence(availability=Always()).wait(IDS[:2], 0.0, 3)
    monkeypatch.setattr("fedsim.sim.absence.LOOKS", 200)
    with pytest.raises(ValueError, match="10 of 10 clients are needed at once .* by second .* never were"):
        Absence(availability=Diurnal(period=10.0, share=0.3)).wait(IDS[:10], 0.0, 10)
