"""MoNNA and decentralised SGD, one node after the other.

Letters: n nodes, f faulty at most, theta_i a node's model, m_i its momentum, h_i its model after the local step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.reference.clients import Clients, stream


def monna(
    clients: Clients,
    x0: Tensor,
    rounds: int,
    *,
    lr: float,
    beta: float,
    f: int,
    arrival: str = "all",
    byzantine: Sequence[int] = (),
    attack: Callable[[Tensor], Tensor] = lambda mean: -mean,
    seed: int = 0,
) -> Tensor:
    """[rounds, n, P]: the nodes' models after every round; faulty nodes all send attack(mean of the correct h_i)."""
    n = clients.n
    theta = [x0.clone() for _ in range(n)]
    m = [torch.zeros_like(x0) for _ in range(n)]
    path = []
    for t in range(rounds):
        h = []
        for i in range(n):
            m[i] = beta * m[i] + (1 - beta) * clients.gradient(i, theta[i], t, 0)
            h.append(theta[i] - lr * m[i])
        lie = attack(torch.stack([h[i] for i in range(n) if i not in byzantine]).mean(0))
        sent = [lie if i in byzantine else h[i] for i in range(n)]
        for i in range(n):
            heard = list(range(n))
            if arrival == "adversarial":
                draw = stream(seed, i, t).uniform("arrival", n, dtype=torch.float64)[0].tolist()
                others = [j for j in range(n) if j != i and j not in byzantine]
                lost = sorted(others, key=lambda j: draw[j])[:f]
                heard = [j for j in heard if j not in lost]
            keep = n - f if arrival == "all" else n - 2 * f
            near = sorted(heard, key=lambda j: (float((sent[j] - sent[i]).norm()), j))[:keep]
            theta[i] = sum((sent[j] for j in near), start=torch.zeros_like(x0)) / keep
        path.append(torch.stack(theta))
    return torch.stack(path)


def dsgd(clients: Clients, x0: Tensor, rounds: int, *, lr: float) -> Tensor:
    """[rounds, P]: after the mixing all nodes hold the same model."""
    theta = [x0.clone() for _ in range(clients.n)]
    path = []
    for t in range(rounds):
        h = [theta[i] - lr * clients.gradient(i, theta[i], t, 0) for i in range(clients.n)]
        mean = sum(h, start=torch.zeros_like(x0)) / clients.n
        theta = [mean.clone() for _ in range(clients.n)]
        path.append(mean)
    return torch.stack(path)
