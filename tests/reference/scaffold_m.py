"""SCAFFOLD-M and SCAFFOLD-M-VR, one client after the other, as the algorithm boxes write them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort


def scaffold_m(
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
    g, c, before = torch.zeros_like(x), torch.zeros_like(x), x
    own = [torch.zeros_like(x) for _ in range(clients.n)]
    path = []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total, change = torch.zeros_like(x), torch.zeros_like(x)
        for i in chosen:
            y, used = x.clone(), torch.zeros_like(x)
            steps = clients.steps(i)
            for k in range(steps):
                h = clients.gradient(i, y, jobs[i], k)
                if reduced:
                    there = clients.gradient(i, before, jobs[i], k)
                    u = h - beta * (own[i] - c) + (1 - beta) * (g - there)
                else:
                    u = beta * (h - own[i] + c) + (1 - beta) * g
                y = y - eta * u
                used += h
            jobs[i] += 1
            total += (x - y) / (eta * steps)
            change += used / steps - own[i]
            own[i] = used / steps
        g = total / len(chosen)
        x, before = x - gamma * g, x
        c = c + change / clients.n
        path.append(x)
    return torch.stack(path)
