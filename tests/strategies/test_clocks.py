"""Weights of asynchronous schemes: p_i over the chance that i takes part in an aggregation."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim.sim.devices import FX, Devices, Exponential, LogNormal, law
from fedsim.strategies.clocks import (
    SAMPLES,
    Durations,
    Times,
    buffer_weights,
    first_weights,
    given_jobs,
    importances,
    memoryless_shares,
    schedule_shares,
    window_weights,
)
from fedsim.streams import Streams
from tests.build import f_80

P = torch.full((5,), 0.2, dtype=torch.float64)


def _fixed(tau: Any) -> Times:
    """Clocks that never vary."""
    seconds = torch.as_tensor(tau, dtype=torch.float64)
    return Times(seconds, torch.zeros_like(seconds))


def _law(devices: Devices, clients: int, bits: float = 0.0) -> Times:
    """What the devices say of jobs of one step that carry so many bits each way."""
    ids, bits_each = torch.arange(clients), torch.full((clients,), bits).double()
    found = law(devices, Streams(0, ids, ids), torch.ones(clients).double(), bits_each, bits_each)
    assert found is not None
    return Times(*found)


def _drawn(devices: Devices, clients: int, samples: int = SAMPLES, bits_up: float = 0.0) -> Tensor:
    """[clients, samples] seconds of the clients' first jobs."""
    ids, jobs = torch.arange(clients).repeat_interleave(samples), torch.arange(samples).repeat(clients)
    steps, down, up = (torch.full((len(ids),), v, dtype=torch.float64) for v in (1.0, 0.0, bits_up))
    return devices.seconds(Streams(0, ids, jobs), steps, down, up).view(clients, samples)


def test_f_80_weights_are_those_of_the_table() -> None:
    tau = _drawn(FX(x=80, count=5), 5, 1)
    assert tau[:, 0].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    times = _law(FX(x=80, count=5), 5)
    assert torch.equal(times.least, tau[:, 0]) and not times.rest.any()
    assert first_weights(P, times).tolist() == pytest.approx([2.283, 1.827, 1.370, 0.913, 0.457], abs=5e-4)
    assert window_weights(P, times, 0.5).tolist() == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.2])
    assert window_weights(P, times, 0.2).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_a_window_that_divides_a_job_exactly_is_not_counted_twice() -> None:
    m, interval = 20, 0.2
    tau = _law(FX(x=80, count=m), m)
    whole = [-(-round(1e6 * (1 - 0.8 * i / (m - 1))) // round(1e6 * interval)) for i in range(m)]
    assert (m * window_weights(torch.full((m,), 1 / m), tau, interval)).tolist() == pytest.approx(whole)


@pytest.mark.parametrize("clients, size", [(5, 2), (5, 3), (8, 5)])
def test_buffer_weights_invert_the_share_of_aggregations(clients: int, size: int) -> None:
    tau = [1.0 + 0.37 * i + 0.011 * i * i for i in range(clients)]
    back, count, steps = list(tau), [0] * clients, 20_000
    for _ in range(steps):
        first = sorted(range(clients), key=lambda i: back[i])[:size]
        now = max(back[i] for i in first)
        for i in first:
            count[i] += 1
            back[i] = now + tau[i]
    p = torch.full((clients,), 1 / clients, dtype=torch.float64)
    d = buffer_weights(p, _fixed(tau), size)
    assert d.tolist() == pytest.approx([steps / n / clients for n in count], rel=5e-3)


def test_a_full_buffer_weighs_by_importance() -> None:
    torch.testing.assert_close(buffer_weights(P, _fixed(f_80()), 5), P)
    torch.testing.assert_close(buffer_weights(P, _law(Exponential(x=80, count=5), 5), 5), P)


def test_clocks_that_tie_share_buffers_as_the_fleet_serves_them() -> None:
    # 0 1 | 2 3 | 4 0 | 1 2 | 3 4: in the order of sending, everybody is in two of five
    assert buffer_weights(P, _fixed([1.0] * 5), 2).tolist() == pytest.approx([0.5] * 5)


def test_exponential_clocks_arrive_as_often_as_the_formulas_say() -> None:
    times = _law(Exponential(mean=1.0, x=80, count=5), 5)
    assert first_weights(P, times).tolist() == pytest.approx([2.283, 1.827, 1.370, 0.913, 0.457], abs=5e-4)
    for interval in (0.5, 0.2):
        exact = [0.2 / (1 - exp(-interval / t)) for t in f_80()]
        assert window_weights(P, times, interval).tolist() == pytest.approx(exact, rel=1e-12)


def test_windows_of_shifted_exponential_clocks_are_those_of_drawn_jobs() -> None:
    # within five standard errors of the mean of 4,096 drawn jobs; the shift ends in, before and at the end of a window
    devices = Exponential(mean=1.0, x=80, count=5, shift=0.3, uplink=10.0)
    streams = Streams(0, torch.arange(5), torch.arange(5))
    one, bits = torch.ones(5).double(), torch.full((5,), 2.0).double()
    drawn = _drawn(devices, 5, bits_up=2.0)
    found = law(devices, streams, one, torch.zeros(5).double(), bits)
    assert found is not None and found[0].tolist() == pytest.approx([0.5] * 5)
    for interval in (0.2, 0.25, 0.7):
        windows = torch.ceil(drawn / interval)
        error = 5 * windows.std(1) / SAMPLES**0.5
        ours = window_weights(torch.ones(5).double(), Times(*found), interval)
        assert bool(((ours - windows.mean(1)).abs() <= error).all()), interval


@pytest.mark.parametrize("clients", [5, 1000])
def test_two_memoryless_clocks_in_a_buffer_are_right_for_small_and_large_federations(clients: int) -> None:
    # i is first with r_i / R; or second, after some j: r_j / R * r_i / (R - r_j)
    tau = torch.tensor(f_80(clients), dtype=torch.float64)
    rates = 1 / tau
    total = rates.sum()
    after = rates / (total - rates)
    exact = rates / total * (1 + after.sum() - after)
    p = torch.full((clients,), 1 / clients, dtype=torch.float64)
    ratio = buffer_weights(p, Times(torch.zeros_like(tau), tau), 2) * exact / p
    assert float(ratio.mean()) == pytest.approx(1, abs=2e-3)
    assert float((ratio - 1).abs().max()) < 0.02
    assert float(memoryless_shares(rates, 2).sum()) == pytest.approx(2)


def test_drawn_schedules_agree_with_the_chances_of_memoryless_clocks() -> None:
    tau = torch.tensor(f_80(), dtype=torch.float64)
    drawn = _drawn(Exponential(mean=1.0, x=80, count=5), 5)
    by_schedule = schedule_shares(
        Durations(drawn, 0 * drawn, drawn), size=3
    )  # 4,000 aggregations: +- 5 / sqrt(4,000) of a chance
    torch.testing.assert_close(by_schedule, memoryless_shares(1 / tau, 3), rtol=0, atol=0.04)


def _durations(*jobs: tuple[float, float, float]) -> Durations:
    """Of jobs that never vary: (with one message, more for each further one, at most) of each client."""
    return Durations(*torch.tensor(jobs, dtype=torch.float64)[:, None].unbind(2))


def test_a_job_brings_what_its_client_missed() -> None:
    # alone in a buffer: 0 0 0 1 | 0 0 0 0 1 | ..., since five messages take client 1 2 + 4 * 0.5 s, and four of the
    # other's jobs fit in; with one message a job it would be 2 to 1
    assert schedule_shares(_durations((1, 0, 1), (2, 0.5, 4)), size=1).tolist() == pytest.approx([0.8, 0.2])


def test_a_window_in_which_nobody_starts_sends_no_message() -> None:
    # a job ends in every other window, with one message; with one for each window that it spans it would last 3
    share = schedule_shares(_durations((1.5, 1, 2.5)), interval=1.0)
    assert share.tolist() == pytest.approx([0.5], abs=1e-3)


def test_clocks_of_another_law_are_drawn() -> None:
    ids, one = torch.arange(3), torch.ones(3).double()
    assert law(LogNormal(jitter=0.5), Streams(0, ids, ids), one, one, one) is None
    assert law(LogNormal(), Streams(0, ids, ids), one, one, one) is not None


def test_exponential_jobs_arrive_first_in_proportion_to_their_rates() -> None:
    # the event loop itself, 8,000 arrivals: P(i is next) = (1 / tau_i) / H, +-4 standard errors
    tau = _drawn(Exponential(mean=1.0, x=80, count=5), 5, 6000)
    taken, back = [0] * 5, tau[:, 0].tolist()
    for _ in range(8000):
        i = min(range(5), key=lambda j: back[j])
        taken[i] += 1
        back[i] += float(tau[i, taken[i]])
    rates = [1 / t for t in f_80()]
    for count, rate in zip(taken, rates, strict=True):
        share = rate / sum(rates)
        assert count / 8000 == pytest.approx(share, abs=4 * (share * (1 - share) / 8000) ** 0.5)


def test_importances_are_uniform_or_shares_of_samples_among_clients_with_data() -> None:
    n = torch.tensor([3, 0, 1])
    assert importances("uniform", n).tolist() == [0.5, 0.0, 0.5]
    assert importances("num_examples", n).tolist() == [0.75, 0.0, 0.25]


def test_a_client_without_data_does_not_spoil_the_others_weights() -> None:
    p = importances("uniform", torch.tensor([1, 0, 1]))
    tau = _fixed([1.0, 0.0, 3.0])
    assert first_weights(p, tau).tolist() == pytest.approx([2 / 3, 0, 2])
    assert buffer_weights(p, tau, 2).tolist() == pytest.approx([0.5, 0, 0.5])


def test_jobs_that_take_no_time_have_no_unbiased_weights() -> None:
    with pytest.raises(ValueError, match="some take no time"):
        first_weights(P, _fixed([0.0] * 5))


@pytest.mark.parametrize("seconds", [(1.0,), (1.0, 1, 1, 1, 0), (1.0, 1, 1, 1, float("nan"))])
def test_given_job_seconds_must_be_one_positive_number_a_client(seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one positive number for each of the 5 clients"):
        given_jobs(seconds, P)
