"""FedAvg, one client after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort


def fedavg(
    clients: Clients, x: Tensor, rounds: int, *, eta: float, server_lr: float = 1.0, size: int | None = None
) -> Tensor:
    """[rounds, P]: the server's model after every round."""
    jobs = [0] * clients.n
    path = []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total = sum(clients.samples(i) for i in chosen)
        mean = torch.zeros_like(x)
        for i in chosen:
            y = x.clone()
            for k in range(clients.steps(i)):
                y = y - eta * clients.gradient(i, y, jobs[i], k)
            jobs[i] += 1
            mean += clients.samples(i) / total * (x - y)
        x = x - server_lr * mean
        path.append(x)
    return torch.stack(path)
