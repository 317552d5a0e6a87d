"""Weights of asynchronous schemes that make the mean movement of every client its importance p_i.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189, table 1: d_i = p_i / P(i is among an aggregation's contributors). With random clocks
the probability is the long-run frequency 1 / E[aggregations that a job of i lasts], taken from sampled durations.

Letters: N clients, tau_i seconds of a job of client i, p_i importances (they sum to one), d_i weights.
"""

from __future__ import annotations

import heapq
from math import inf
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.fleet import Cost, Fleet

Weights = Literal["unbiased", "identical"]
Importance = Literal["uniform", "num_examples"]
SAMPLES = 4096  # drawn durations of each client, where they vary
TOLERANCE = 1e-9  # ceil(tau / interval) must not see the rounding of the division


def able(fleet: Fleet) -> Tensor:
    """[W] clients that have data. The others would reply at once, with nothing, and hold virtual time up.

    Raises:
        ValueError: if there are none.
    """
    clients = fleet.clients[fleet.num_examples > 0]
    if not len(clients):
        raise ValueError("no client has data; give some of them samples")
    return clients


def importances(kind: Importance, num_examples: Tensor) -> Tensor:
    """p [N] float64: the same for all that have data, or the share of samples."""
    n = num_examples if kind == "num_examples" else num_examples > 0
    return n.to(torch.float64) / n.sum()


def given_seconds(job_seconds: tuple[float, ...], p: Tensor) -> Tensor:
    """tau [N, 1] as the file gives it.

    Raises:
        ValueError: if there is not one positive number a client.
    """
    if len(job_seconds) != len(p) or not all(0 < t < inf for t in job_seconds):
        raise ValueError(f"strategy.job_seconds needs one positive number for each of the {len(p)} clients")
    return torch.tensor(job_seconds, dtype=torch.float64)[:, None]


def durations(fleet: Fleet, cost: Cost, x: Tensor) -> Tensor:
    """tau [N, samples] of a job that downloads x.

    Raises:
        ValueError: if the fleet does not know them.
    """
    samples = max(1, SAMPLES * 1000 // max(len(fleet.clients), 1000))
    tau = fleet.job_seconds(cost, samples, x=x)
    if not bool(torch.isfinite(tau).all()):
        raise ValueError(
            "weights=unbiased needs every client's job time, which this fleet does not know; give "
            "strategy.job_seconds, one number a client, or weights: identical"
        )
    return tau


def window_weights(p: Tensor, tau: Tensor, interval: float) -> Tensor:
    """d [N] of FedFix: p_i * E[ceil(tau_i / interval)], the windows that a job of i spans.

    >>> window_weights(torch.full((5,), 0.2), torch.tensor([[1.0], [0.8], [0.6], [0.4], [0.2]]), 0.5).tolist()
    [0.4000..., 0.4000..., 0.4000..., 0.2000..., 0.2000...]
    """
    return p * torch.ceil(tau / interval - TOLERANCE).clamp(min=1).mean(1)


def first_weights(p: Tensor, tau: Tensor) -> Tensor:
    """d [N] of asynchronous FedAvg: H * tau_i * p_i with H = sum of 1 / tau_j over clients with data.

    Raises:
        ValueError: if a client's jobs take no time.
    """
    mean = tau.mean(1)
    if bool((mean[p > 0] <= 0).any()):
        raise ValueError(
            "weights=unbiased follow from how long jobs take, and some take no time; give clients.devices seconds, or "
            "weights: identical"
        )
    return (1 / mean[p > 0]).sum() * mean * p


def buffer_weights(p: Tensor, tau: Tensor, size: int, steps: int = 4000) -> Tensor:
    """d [N] of FedBuff: p_i over the share of aggregations that contain i, counted on the schedule itself."""
    drawn = tau.numpy()
    taken = np.zeros(len(drawn), dtype=np.int64)
    count = np.zeros(len(drawn))
    heap = [(float(drawn[i, 0]), i) for i in torch.nonzero(p).flatten().tolist()]
    heapq.heapify(heap)
    for _ in range(steps):
        group = [heapq.heappop(heap) for _ in range(size)]
        now = group[-1][0]
        for _, i in group:
            count[i] += 1
            taken[i] += 1
            heapq.heappush(heap, (now + float(drawn[i, taken[i] % drawn.shape[1]]), i))
    share = torch.from_numpy(count / steps)
    return p / share.clamp(min=1 / steps)
