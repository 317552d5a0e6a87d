"""Compressed gradient descent, one client after the other, as the algorithm boxes write it.

compress(vector, client, job) is what arrives; a client's jobs are counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.streams import server_rng
from tests.reference.clients import Clients, cohort

Compress = Callable[[Tensor, int, int], Tensor]


def compressed_descent(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    compress: Compress,
    feedback: bool,
) -> Tensor:
    """[rounds, P]: DCGD, or with feedback EF14, the step inside the message; e_i is what earlier ones left out."""
    e = [torch.zeros_like(x) for _ in range(clients.n)]
    path = []
    for r in range(rounds):
        total = torch.zeros_like(x)
        for i in range(clients.n):
            u = eta * clients.full(i, x) + e[i]
            c = compress(u, i, r)
            if feedback:
                e[i] = u - c
            total += c
        x = x - total / clients.n
        path.append(x)
    return torch.stack(path)


def ef21(
    clients: Clients, x: Tensor, rounds: int, *, eta: float, compress: Compress, size: int | None = None
) -> Tensor:
    """[rounds, P]; g_i begins at zero, and the step follows the mean of all g_i."""
    g, jobs = [torch.zeros_like(x) for _ in range(clients.n)], [0] * clients.n
    path = []
    for r in range(rounds):
        for i in cohort(0, r, clients.n, size):
            g[i] = g[i] + compress(clients.gradient(i, x, jobs[i], 0) - g[i], i, jobs[i])
            jobs[i] += 1
        x = x - eta * torch.stack(g).mean(0)
        path.append(x)
    return torch.stack(path)


def ef21_bc(
    clients: Clients, x: Tensor, rounds: int, *, eta: float, compress: Compress, compress_server: Compress
) -> Tensor:
    """[rounds, P]; the server follows the mean of the g_i by compressed changes; a client's odd jobs are its steps."""
    g, v = [torch.zeros_like(x) for _ in range(clients.n)], torch.zeros_like(x)
    path = []
    for r in range(rounds):
        for i in range(clients.n):
            g[i] = g[i] + compress(clients.gradient(i, x, 2 * r, 0) - g[i], i, 2 * r)
        v = v + compress_server(torch.stack(g).mean(0) - v, -1, r)
        x = x - eta * v
        path.append(x)
    return torch.stack(path)


def diana(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    alpha: float,
    compress: Compress,
    size: int | None = None,
) -> Tensor:
    """[rounds, P]; h_i begins at zero."""
    h, jobs = [torch.zeros_like(x) for _ in range(clients.n)], [0] * clients.n
    path = []
    for r in range(rounds):
        mean, asked = torch.stack(h).mean(0), cohort(0, r, clients.n, size)
        m = {i: compress(clients.gradient(i, x, jobs[i], 0) - h[i], i, jobs[i]) for i in asked}
        x = x - eta * (mean + torch.stack(list(m.values())).mean(0))
        for i in asked:
            h[i], jobs[i] = h[i] + alpha * m[i], jobs[i] + 1
        path.append(x)
    return torch.stack(path)


def marina(clients: Clients, x: Tensor, rounds: int, *, eta: float, p: float, compress: Compress) -> Tensor:
    """[rounds, P]; changes are of one minibatch, the same at both points."""
    g, before = torch.zeros_like(x), x
    path = []
    for r in range(rounds):
        if server_rng(0, "server", r).random() < p or r == 0:
            g = torch.stack([clients.full(i, x) for i in range(clients.n)]).mean(0)
        else:
            sent = [
                compress(clients.gradient(i, x, r, 0) - clients.gradient(i, before, r, 0), i, r)
                for i in range(clients.n)
            ]
            g = g + torch.stack(sent).mean(0)
        before, x = x, x - eta * g
        path.append(x)
    return torch.stack(path)
