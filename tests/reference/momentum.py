"""FedAvg-M and FedAvg-M-VR, one client after the other, as the algorithm boxes write them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort


def fedavg_m(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    beta: float,
    gamma: float,
    size: int | None = None,
    reduced: bool = False,
) -> Tensor:
    """[rounds, P]: the server's model after every round; `reduced` is the variance-reduced form."""
    jobs = [0] * clients.n
    g, before = torch.zeros_like(x), x
    path = []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total = torch.zeros_like(x)
        for i in chosen:
            y = x.clone()
            for k in range(clients.steps(i)):
                if reduced:
                    there = clients.gradient(i, before, jobs[i], k)
                    u = clients.gradient(i, y, jobs[i], k) + (1 - beta) * (g - there)
                else:
                    u = beta * clients.gradient(i, y, jobs[i], k) + (1 - beta) * g
                y = y - eta * u
            jobs[i] += 1
            total += (x - y) / (eta * clients.steps(i))
        g = total / len(chosen)
        x, before = x - gamma * g, x
        path.append(x)
    return torch.stack(path)
