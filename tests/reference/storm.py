"""STEM and MB-STORM, one client after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort


def stem(
    clients: Clients, x: Tensor, rounds: int, *, eta: float, a: float, full: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """[rounds, P] each: the mean model and the mean momentum after every K steps."""
    n = clients.n
    d = sum((full(i, x) for i in range(n)), start=torch.zeros_like(x)) / n
    models, momenta = [], []
    for r in range(rounds):
        all_x, all_d = [], []
        for i in range(n):
            x_i, d_i = x, d
            for k in range(clients.steps(i)):
                before, x_i = x_i, x_i - eta * d_i
                d_i = clients.gradient(i, x_i, r, k) + (1 - a) * (d_i - clients.gradient(i, before, r, k))
            all_x.append(x_i)
            all_d.append(d_i)
        x, d = torch.stack(all_x).mean(0), torch.stack(all_d).mean(0)
        models.append(x)
        momenta.append(d)
    return torch.stack(models), torch.stack(momenta)


def mb_storm(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    beta: float,
    gamma: float,
    g: Tensor | None = None,
    size: int | None = None,
) -> Tensor:
    """[rounds, P]: the model after every round; g is the estimate at the start, zero if left out."""
    jobs = [0] * clients.n
    g, before = torch.zeros_like(x) if g is None else g, x
    path = []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        here, there = torch.zeros_like(x), torch.zeros_like(x)
        for i in chosen:
            steps = clients.steps(i)
            for k in range(steps):
                here += clients.gradient(i, x, jobs[i], k) / (len(chosen) * steps)
                there += clients.gradient(i, before, jobs[i], k) / (len(chosen) * steps)
            jobs[i] += 1
        g = here + (1 - beta) * (g - there)
        x, before = x - gamma * g, x
        path.append(x)
    return torch.stack(path)
