"""Weights of asynchronous schemes that make the mean movement of every client its importance p_i.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189, table 1: d_i = p_i / P(i is among an aggregation's contributors). With random clocks
the probability is the long-run frequency 1 / E[aggregations that a job of i lasts].

Under a compressed downlink a job lasts the longer, the more messages its client has missed. How many these are
follows from the schedule, and the schedule from how long jobs last: there the probability is that of the schedule
itself, played from its first job on.

Letters: N clients, T_i seconds of a job of client i, tau_i their mean, p_i importances (they sum to one), d_i weights.
"""

from __future__ import annotations

import heapq
from array import array
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Cost, Fleet, Times

Importance = Literal["uniform", "num_examples"]
SAMPLES = 4096  # drawn durations of each client, where nothing better is known
JOBS, MOST_JOBS = 200, 2_000_000  # of each client and of all of them that a schedule is followed for
STEPS = 4000  # aggregations that it is followed for at least
MANY = 2**31  # messages: the whole model is shorter
DRAWS = 4_000_000  # numbers drawn for the chances of memoryless clocks
TOLERANCE = 1e-9  # ceil(T / interval) must not see the rounding of the division


def able(fleet: Fleet) -> Tensor:
    """[W] clients that have data. The others would reply at once, with nothing, and hold virtual time up.

    Raises:
        ValueError: if there are none.
    """
    clients = fleet.clients[fleet.num_examples > 0]
    if not len(clients):
        raise ValueError("no client has data; give some of them samples")
    return clients


def check_fits(key: str, size: int, fleet: Fleet) -> None:
    """Refuse to want more clients at a time than have data."""
    if size > (most := len(able(fleet))):
        raise ValueError(f"{key}={size} exceeds the {most} clients with data; lower it")


def positive(key: str, size: int) -> None:
    """Refuse a number of clients below one."""
    if size < 1:
        raise ValueError(f"{key} must be at least 1, got {size}")


def importances(kind: Importance, num_examples: Tensor) -> Tensor:
    """p [N] float64: the same for all that have data, or the share of samples."""
    n = num_examples if kind == "num_examples" else num_examples > 0
    return n.to(torch.float64) / n.sum()


@dataclass(frozen=True)
class JobTimes:
    """How long jobs take that bring one message, two of them, and the whole model.

    A link takes as long for each message as for any other, until the whole model is shorter.
    """

    one: Times
    two: Times
    whole: Times

    @property
    def vary(self) -> bool:
        """Whether it matters how many messages a client missed."""
        return not torch.equal(self.one.mean, self.whole.mean)

    def seconds(self, clients: Tensor) -> Durations:
        """Durations of these clients' [W] jobs."""
        one, two, whole = (durations(times)[clients] for times in (self.one, self.two, self.whole))
        return Durations(one, two - one, whole)


@dataclass(frozen=True)
class Durations:
    """[W, samples] seconds of clients' jobs, taken in turn: with one message, more for each further one, at most."""

    one: Tensor
    further: Tensor
    most: Tensor


def given_jobs(job_seconds: tuple[float, ...], p: Tensor) -> JobTimes:
    """Jobs that last as long as the file says, whatever they bring.

    Raises:
        ValueError: if there is not one positive number a client.
    """
    if len(job_seconds) != len(p) or not all(0 < t < inf for t in job_seconds):
        raise ValueError(f"job_seconds needs one positive number for each of the {len(p)} clients")
    times = Times(torch.tensor(job_seconds, dtype=torch.float64), torch.zeros_like(p))
    return JobTimes(times, times, times)


def known_jobs(fleet: Fleet, cost: Cost, x: Tensor) -> JobTimes:
    """Jobs that download x [P].

    Raises:
        ValueError: if the fleet does not know how long they take.
    """
    samples = max(1, SAMPLES * 1000 // max(len(fleet.clients), 1000))
    counts = (torch.full_like(fleet.clients, messages) for messages in (1, 2, MANY))
    jobs = JobTimes(*(fleet.job_times(cost, samples, messages, x=x) for messages in counts))
    if not bool(torch.isfinite(jobs.one.least).all()):
        raise ValueError(
            "weights=unbiased needs every client's job time, which this fleet does not know; give "
            "strategy.job_seconds, one number a client, or weights: observed, or weights: identical"
        )
    return jobs


def durations(times: Times) -> Tensor:
    """[N, samples] seconds of clients' jobs; one sample where they never vary."""
    if times.drawn is not None:
        return times.drawn
    if not bool((times.rest > 0).any()):
        return times.least[:, None]
    noise = torch.from_numpy(np.random.default_rng(0).exponential(size=(len(times.least), SAMPLES)))
    return times.least[:, None] + times.rest[:, None] * noise


def window_weights(p: Tensor, times: Times, interval: float) -> Tensor:
    """d [N] of FedFix: p_i * E[ceil(T_i / interval)], the windows that a job of i spans.

    With T = k * interval + r + an exponential time of mean rest, that is k + 1 windows and another one for each
    further end of a window that the job outlives: k + 1 + exp(-(interval - r) / rest) / (1 - exp(-interval / rest)).

    >>> tau = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    >>> window_weights(torch.full((5,), 0.2), Times(tau, torch.zeros(5)), 0.5).tolist()
    [0.4000..., 0.4000..., 0.4000..., 0.2000..., 0.2000...]
    """
    if times.drawn is not None:
        return p * torch.ceil(times.drawn / interval - TOLERANCE).clamp(min=1).mean(1)
    whole = torch.ceil(times.least / interval - TOLERANCE).clamp(min=1)
    k = torch.floor(times.least / interval + TOLERANCE)
    left = ((k + 1) - times.least / interval).clamp(max=1.0) * interval / times.rest
    outlived = k + 1 + torch.exp(-left) / -torch.expm1(-interval / times.rest)
    return p * torch.where(times.rest > 0, outlived, whole)


def first_weights(p: Tensor, times: Times) -> Tensor:
    """d [N] of asynchronous FedAvg: H * tau_i * p_i with H = sum of 1 / tau_j over clients with data.

    Raises:
        ValueError: if a client's jobs take no time.
    """
    mean = times.mean
    if bool((mean[p > 0] <= 0).any()):
        raise ValueError(
            "weights=unbiased follow from how long jobs take, and some take no time; give clients.devices seconds, or "
            "weights: observed, or weights: identical"
        )
    return (1 / mean[p > 0]).sum() * mean * p


def buffer_weights(p: Tensor, times: Times, size: int) -> Tensor:
    """d [N] of FedBuff: p_i over the share of aggregations that contain i."""
    with_data = torch.nonzero(p).flatten()
    share = torch.ones_like(p)
    if bool((times.rest[with_data] > 0).all()) and not bool((times.least[with_data] > 0).any()):
        share[with_data] = memoryless_shares(1 / times.rest[with_data], size)
    else:
        share[with_data] = schedule_shares(JobTimes(times, times, times).seconds(with_data), size=size)
    return p / share


def schedule_shares(seconds: Durations, *, size: int = 0, interval: float = inf) -> Tensor:
    """[W] share of aggregations that contain each client, counted on the schedule that a fleet runs.

    Jobs that end at the same time arrive in the order in which they were sent, and all of an aggregation start again
    together, in the order of their arrival. They bring every message since the last one that their client was sent;
    there is one whenever somebody starts, and the first job brings the whole model.

    Args:
        seconds: of W clients' jobs.
        size: replies of an aggregation; 0 for windows.
        interval: seconds of a window, whose replies are an aggregation.
    """
    clients, samples = seconds.one.shape
    # read one by one, numbers come out of such arrays many times as fast as out of NumPy's
    one, further, most = (array("d", each.numpy().tobytes()) for each in (seconds.one, seconds.further, seconds.most))
    count, seen = [0] * clients, [1] * clients
    heap = [(most[i * samples], i, i) for i in range(clients)]  # (finish, place in the order of sending, client)
    heapq.heapify(heap)
    sent, steps, message = clients, 0, 1
    while steps < STEPS or (steps < MOST_JOBS and sent - clients + size <= min(JOBS * clients, MOST_JOBS)):
        steps += 1
        if size:
            group = [heapq.heappop(heap) for _ in range(size)]
            now = group[-1][0]
        else:
            now, group = steps * interval, []
            while heap and heap[0][0] <= now + TOLERANCE:
                group.append(heapq.heappop(heap))
        message += bool(group)
        for _, _, i in group:
            count[i] += 1
            job = i * samples + count[i] % samples
            lasts = min(one[job] + (message - seen[i] - 1) * further[job], most[job])
            seen[i] = message
            heapq.heappush(heap, (now + lasts, sent, i))
            sent += 1
    return torch.tensor(count, dtype=torch.float64).clamp(min=1) / steps


def memoryless_shares(rates: Tensor, size: int) -> Tensor:
    """[W] chance of each client to be among the first `size`, for exponential clocks with these rates [W].

    Whoever is next is i with the chance rate_i / (rates of those not yet in): added up along some drawn orders, these
    chances are right on average and vary little, since no draw decides on a client before it is in.
    """
    clients = len(rates)
    if size >= clients:
        return torch.ones_like(rates)
    orders = 1 if size == 1 else max(16, min(SAMPLES, DRAWS // (size * clients)))
    left, share = rates.expand(orders, -1).clone(), torch.zeros_like(rates)
    generator = torch.Generator().manual_seed(0)
    for k in range(size):
        chance = left / left.sum(1, keepdim=True)
        share += chance.mean(0)
        if k + 1 < size:
            left.scatter_(1, torch.multinomial(chance, 1, generator=generator), 0.0)
    return share
