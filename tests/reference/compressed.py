"""Compressed gradient descent, one client after the other: DCGD, and EF14 with the step inside the message."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.reference.clients import Clients


def compressed_descent(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    compress: Callable[[Tensor, int, int], Tensor],
    feedback: bool,
) -> Tensor:
    """[rounds, P]: compress(vector, client, job) is what arrives; with feedback, e_i is what earlier ones left out."""
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
