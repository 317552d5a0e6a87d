"""Compressed gradient descent, one client after the other, as the algorithm boxes write it.

compress(vector, client, job) is what arrives; a client's jobs are counted from 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedsim.compress.packet import Compressor
from fedsim.streams import Streams, server_rng
from tests.reference.clients import Clients, cohort, stream

Compress = Callable[[Tensor, int, int], Tensor]


def keyed(compressor: Compressor, seed: int = 0) -> Compress:
    """A compressor of the simulator, for one vector of one client's job."""

    def compress(v: Tensor, client: int, job: int) -> Tensor:
        return compressor.encode(v[None], stream(seed, client, job)).decode()[0]

    return compress


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


def power_sgd(rows: int, columns: int, rank: int, first: Callable[[int, int], Tensor]) -> Compress:
    """PowerSGD of one matrix with a warm start, by numpy: P of what M Q spans, then Q = M^T P; a client keeps its Q.

    Q stands on the shorter side, so that a wide matrix is transposed; `first(client, job)` is its first Q.
    """
    kept: dict[int, np.ndarray] = {}

    def compress(v: Tensor, client: int, job: int) -> Tensor:
        m = v.numpy().reshape(rows, columns)
        tall = m if rows >= columns else m.T
        q = kept[client] if client in kept else first(client, job).numpy()
        left, size, _ = np.linalg.svd(tall @ q, full_matrices=False)
        p = left[:, size > 1e-12 * size.max()]
        kept[client] = tall.T @ p
        sent = p @ kept[client].T
        return torch.from_numpy((sent if rows >= columns else sent.T).reshape(-1).copy())

    return compress


def first_q(side: int) -> Callable[[int, int], Tensor]:
    """PowerSGD's first Q of rank 1 for a matrix w, of a client's job or of the server's (-1) in a round, in seed 0."""

    def first(client: int, job: int) -> Tensor:
        seed = 0 if client >= 0 else int(server_rng(0, "server", job).integers(1 << 62))
        streams = Streams(seed, torch.tensor([client]), torch.tensor([job]))
        return streams.normal("compress.powersgd.w", side, 1, dtype=torch.float64)[0]

    return first


def ef21(
    clients: Clients, x: Tensor, rounds: int, *, eta: float, compress: Compress, size: int | None = None
) -> Tensor:
    """[rounds, P]; g_i begins at zero, and the step follows the mean of all g_i."""
    g, jobs = [torch.zeros_like(x) for _ in range(clients.n)], [0] * clients.n
    path = []
    for r in range(rounds):
        for i in cohort(r, clients.n, size):
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
        mean, asked = torch.stack(h).mean(0), cohort(r, clients.n, size)
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
