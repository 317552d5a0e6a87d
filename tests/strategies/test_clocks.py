"""Weights of asynchronous schemes: p_i over the chance that i takes part in an aggregation."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch import Tensor

from fedsim.sim.devices import FX, Devices, Exponential
from fedsim.strategies.clocks import SAMPLES, buffer_weights, first_weights, given_seconds, importances, window_weights
from fedsim.streams import Streams
from tests.build import f_80

P = torch.full((5,), 0.2, dtype=torch.float64)


def _drawn(devices: Devices, clients: int, samples: int = SAMPLES) -> Tensor:
    """[clients, samples] seconds."""
    ids = torch.arange(clients)
    zero, one = torch.zeros(clients).double(), torch.ones(clients).double()
    draws = [devices.seconds(Streams(0, ids, torch.full_like(ids, k)), one, zero, zero) for k in range(samples)]
    return torch.stack(draws, 1)


def test_f_80_weights_are_those_of_the_table() -> None:
    tau = _drawn(FX(x=80, count=5), 5, 1)
    assert tau[:, 0].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert first_weights(P, tau).tolist() == pytest.approx([2.283, 1.827, 1.370, 0.913, 0.457], abs=5e-4)
    assert window_weights(P, tau, 0.5).tolist() == pytest.approx([0.4, 0.4, 0.4, 0.2, 0.2])
    assert window_weights(P, tau, 0.2).tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_a_window_that_divides_a_job_exactly_is_not_counted_twice() -> None:
    m, interval = 20, 0.2
    tau = _drawn(FX(x=80, count=m), m, 1)
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
    d = buffer_weights(p, torch.tensor(tau, dtype=torch.float64)[:, None], size)
    assert d.tolist() == pytest.approx([steps / n / clients for n in count], rel=5e-3)


def test_a_full_buffer_weighs_by_importance() -> None:
    tau = torch.tensor(f_80(), dtype=torch.float64)[:, None]
    torch.testing.assert_close(buffer_weights(P, tau, 5), P)


def test_exponential_clocks_arrive_as_often_as_the_formulas_say() -> None:
    # mean of drawn times within four standard errors: 1 / sqrt(4096) of the mean each
    tau = _drawn(Exponential(mean=1.0, x=80, count=5), 5)
    assert first_weights(P, tau).tolist() == pytest.approx([2.283, 1.827, 1.370, 0.913, 0.457], rel=0.1)
    for interval in (0.5, 0.2):
        exact = [0.2 / (1 - exp(-interval / t)) for t in f_80()]
        assert window_weights(P, tau, interval).tolist() == pytest.approx(exact, rel=0.07)


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
    tau = torch.tensor([[1.0], [0.0], [3.0]], dtype=torch.float64)
    assert first_weights(p, tau).tolist() == pytest.approx([2 / 3, 0, 2])
    assert buffer_weights(p, tau, 2).tolist() == pytest.approx([0.5, 0, 0.5])


def test_jobs_that_take_no_time_have_no_unbiased_weights() -> None:
    with pytest.raises(ValueError, match="some take no time"):
        first_weights(P, torch.zeros(5, 1))


@pytest.mark.parametrize("seconds", [(1.0,), (1.0, 1, 1, 1, 0), (1.0, 1, 1, 1, float("nan"))])
def test_given_job_seconds_must_be_one_positive_number_a_client(seconds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="one positive number for each of the 5 clients"):
        given_seconds(seconds, P)
