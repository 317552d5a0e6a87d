"""FedProx, FedDyn, FedNova and FedCM, one client after the other, as the algorithm boxes write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort


def fedprox(clients: Clients, x: Tensor, rounds: int, *, eta: float, mu: float, size: int | None = None) -> Tensor:
    """[rounds, P]: the server's model after every round; clients count by their samples."""
    jobs, path = [0] * clients.n, []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total, mean = sum(clients.samples(i) for i in chosen), torch.zeros_like(x)
        for i in chosen:
            y = x.clone()
            for k in range(clients.steps(i)):
                y = y - eta * (clients.gradient(i, y, jobs[i], k) + mu * (y - x))
            jobs[i] += 1
            mean += clients.samples(i) / total * y
        x = mean
        path.append(x)
    return torch.stack(path)


def feddyn(clients: Clients, x: Tensor, rounds: int, *, eta: float, alpha: float, size: int | None = None) -> Tensor:
    """[rounds, P], in the scaling of the paper."""
    jobs, path = [0] * clients.n, []
    g, h = [torch.zeros_like(x) for _ in range(clients.n)], torch.zeros_like(x)
    for r in range(rounds):
        chosen, ends = cohort(r, clients.n, size), []
        for i in chosen:
            y = x.clone()
            for k in range(clients.steps(i)):
                y = y - eta * (clients.gradient(i, y, jobs[i], k) - g[i] + alpha * (y - x))
            jobs[i] += 1
            g[i] = g[i] - alpha * (y - x)
            ends.append(y)
        h = h - alpha / clients.n * torch.stack(ends).sub(x).sum(0)
        x = torch.stack(ends).mean(0) - h / alpha
        path.append(x)
    return torch.stack(path)


def fednova(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    momentum: float = 0.0,
    mu: float = 0.0,
    size: int | None = None,
) -> Tensor:
    """[rounds, P]; clients count by their samples, and momentum begins anew in every round."""
    jobs, path = [0] * clients.n, []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total, d, tau = sum(clients.samples(i) for i in chosen), torch.zeros_like(x), 0.0
        for i in chosen:
            p, y, v, counter, a = clients.samples(i) / total, x.clone(), torch.zeros_like(x), 0.0, 0.0
            for k in range(clients.steps(i)):
                v = momentum * v + clients.gradient(i, y, jobs[i], k) + mu * (y - x)
                y = y - eta * v
                counter = momentum * counter + 1
                a = a * (1 - eta * mu) + counter
            jobs[i] += 1
            if clients.steps(i):
                d += p * (x - y) / a
                tau += p * (clients.steps(i) if mu else a)
        x = x - tau * d
        path.append(x)
    return torch.stack(path)


def fedcm(
    clients: Clients, x: Tensor, rounds: int, *, eta: Callable[[int], float], alpha: float, size: int | None = None
) -> Tensor:
    """[rounds, P]; eta is a function of the round."""
    jobs, path, d = [0] * clients.n, [], torch.zeros_like(x)
    for r in range(rounds):
        chosen, changes = cohort(r, clients.n, size), []
        for i in chosen:
            y = x.clone()
            for k in range(steps := clients.steps(i)):
                y = y - eta(r) * (alpha * clients.gradient(i, y, jobs[i], k) + (1 - alpha) * d)
            jobs[i] += 1
            changes.append(x - y)
        mean = torch.stack(changes).mean(0)
        d = mean / (eta(r) * steps)
        x = x - mean
        path.append(x)
    return torch.stack(path)
