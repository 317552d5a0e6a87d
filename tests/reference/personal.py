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
    clients: Clients, x: Tensor, own: Tensor, rounds: int, *, eta: float, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """(server's model after every round [rounds, P], every client's model in the end [n, P]); `own` [P] bool stays."""
    jobs, heads, path = [0] * clients.n, [x.clone() for _ in range(clients.n)], []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total, mean = sum(clients.samples(i) for i in chosen), torch.zeros_like(x)
        for i in chosen:
            start = torch.where(own, heads[i], x)
            y = steps(clients, i, start, jobs[i], eta)
            heads[i], jobs[i] = y, jobs[i] + 1
            mean += clients.samples(i) / total * torch.where(own, 0.0, start - y)
        x = x - mean
        path.append(x)
    return torch.stack(path), torch.stack([torch.where(own, head, x) for head in heads])


def fedrep(
    clients: Clients, x: Tensor, own: Tensor, rounds: int, *, eta: float, head_steps: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `fedper`, with head_steps on a client's own entries first, and then its steps on the others."""
    jobs, heads, path = [0] * clients.n, [x.clone() for _ in range(clients.n)], []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total, mean = sum(clients.samples(i) for i in chosen), torch.zeros_like(x)
        for i in chosen:
            y = torch.where(own, heads[i], x)
            for k in range(head_steps if clients.samples(i) else 0):
                y = torch.where(own, y - eta * clients.gradient(i, y, jobs[i], k), y)
            for k in range(clients.steps(i)):
                y = torch.where(own, y, y - eta * clients.gradient(i, y, jobs[i], k))
            heads[i], jobs[i] = y, jobs[i] + 1
            mean += clients.samples(i) / total * torch.where(own, 0.0, x - y)
        x = x - mean
        path.append(x)
    return torch.stack(path), torch.stack([torch.where(own, head, x) for head in heads])


def ditto(clients: Clients, x: Tensor, rounds: int, *, eta: float, lam: float, size: int | None = None) -> Tensor:
    """[n, P]: the clients' own models in the end; the server's are FedAvg's."""
    jobs, own = [0] * clients.n, [x.clone() for _ in range(clients.n)]
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total, mean = sum(clients.samples(i) for i in chosen), torch.zeros_like(x)
        for i in chosen:
            y = steps(clients, i, x, jobs[i], eta)
            for k in range(clients.steps(i)):
                own[i] = own[i] - eta * (clients.gradient(i, own[i], jobs[i], k) + lam * (own[i] - x))
            jobs[i] += 1
            mean += clients.samples(i) / total * (x - y)
        x = x - mean
    return torch.stack(own)


def pfedme(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    lam: float,
    inner_steps: int,
    inner_lr: float,
    beta: float = 1.0,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(server's model after every round [rounds, P], the clients' theta [n, P])."""
    jobs, own, path = [0] * clients.n, [x.clone() for _ in range(clients.n)], []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        locals_ = []
        for i in chosen:
            w, theta = x, x
            for k in range(clients.steps(i)):
                for _ in range(inner_steps):
                    theta = theta - inner_lr * (clients.gradient(i, theta, jobs[i], k) + lam * (theta - w))
                w = w - eta * lam * (w - theta)
            own[i], jobs[i] = theta, jobs[i] + 1
            locals_.append(w)
        x = (1 - beta) * x + beta * torch.stack(locals_).mean(0)
        path.append(x)
    return torch.stack(path), torch.stack(own)


def apfl(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    alpha: float,
    adaptive: bool = False,
    size: int | None = None,
) -> tuple[Tensor, Tensor, list[float]]:
    """(server's model after every round [rounds, P], the clients' mixtures [n, P], their alpha)."""
    jobs, own, shares, path = [0] * clients.n, [x.clone() for _ in range(clients.n)], [alpha] * clients.n, []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        total, mean = sum(clients.samples(i) for i in chosen), torch.zeros_like(x)
        for i in chosen:
            w, v, a = x, own[i], shares[i]
            for k in range(clients.steps(i)):
                g = clients.gradient(i, a * v + (1 - a) * w, jobs[i], k)
                if adaptive and k == 0:
                    shares[i] = min(1.0, max(0.0, a - eta * float((v - w) @ g)))
                w, v = w - eta * clients.gradient(i, w, jobs[i], k), v - eta * a * g
                a = shares[i]
            own[i], jobs[i] = v, jobs[i] + 1
            mean += clients.samples(i) / total * (x - w)
        x = x - mean
        path.append(x)
    return torch.stack(path), torch.stack([a * v + (1 - a) * x for a, v in zip(shares, own, strict=True)]), shares
