"""SCAFFOLD, one client after the other; option II in the form x - y over K eta, which the simulator does not use."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort


def scaffold(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    option: str = "II",
    server_lr: float = 1.0,
    size: int | None = None,
) -> Tensor:
    """[rounds, P]: the server's model after every round."""
    jobs = [0] * clients.n
    c = torch.zeros_like(x)
    own = [torch.zeros_like(x) for _ in range(clients.n)]
    path = []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        delta, change = torch.zeros_like(x), torch.zeros_like(x)
        for i in chosen:
            y = x.clone()
            for k in range(clients.steps(i)):
                y = y - eta * (clients.gradient(i, y, jobs[i], k) - own[i] + c)
            jobs[i] += 1
            fresh = clients.full(i, x) if option == "I" else own[i] - c + (x - y) / (clients.steps(i) * eta)
            delta += x - y
            change += fresh - own[i]
            own[i] = fresh
        x = x - server_lr * delta / len(chosen)
        c = c + change / clients.n
        path.append(x)
    return torch.stack(path)
