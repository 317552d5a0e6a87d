"""Strategies whose clients have models of their own, one client after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort


def steps(clients: Clients, i: int, y: Tensor, job: int, eta: float, moves: Tensor | float = 1.0) -> Tensor:
    """[P]: client i's model after its steps from y along minibatch gradients times `moves`."""
    for k in range(clients.steps(i)):
        y = y - eta * moves * clients.gradient(i, y, job, k)
    return y


def fedper(
    clients: Clients, x: Tensor, own: Tensor, rounds: int, *, eta: float, size: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(server's model after every round [rounds, P], every client's model in the end [n, P]); `own` [P] bool stays."""
    jobs, heads, path = [0] * clients.n, [x.clone() for _ in range(clients.n)], []
    for r in range(rounds):
        chosen = cohort(seed, r, clients.n, size)
        total, mean = sum(clients.samples(i) for i in chosen), torch.zeros_like(x)
        for i in chosen:
            start = torch.where(own, heads[i], x)
            y = steps(clients, i, start, jobs[i], eta)
            heads[i], jobs[i] = y, jobs[i] + 1
            mean += clients.samples(i) / total * torch.where(own, 0.0, start - y)
        x = x - mean
        path.append(x)
    return torch.stack(path), torch.stack([torch.where(own, head, x) for head in heads])
