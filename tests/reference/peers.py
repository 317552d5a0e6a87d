"""Strategies without a server, one node after the other; graphs are whole matrices.

Letters: n nodes, f faulty at most, theta_i a node's model, m_i its momentum, h_i its model after the local step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.reference.clients import Clients, stream

Weights = Callable[[int], Tensor]
Lie = Callable[[Tensor], Tensor]


def flipped(mean: Tensor) -> Tensor:
    return -mean


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
    attack: Lie = flipped,
    weights: Weights | None = None,
) -> Tensor:
    """[rounds, n, P]: the nodes' models after every round; faulty nodes all send attack(mean of the correct h_i)."""
    n = clients.n
    weights = weights or (lambda t: torch.ones(n, n))
    theta, path = [x0.clone() for _ in range(n)], []
    m = [torch.zeros_like(x0) for _ in range(n)]
    for t in range(rounds):
        m = [beta * m[i] + (1 - beta) * clients.gradient(i, theta[i], t, 0) for i in range(n)]
        h = [theta[i] - lr * m[i] for i in range(n)]
        sent = told(h, byzantine, attack)
        for i in range(n):
            heard = [j for j in range(n) if weights(t)[i, j] > 0]
            keep = len(heard) - (f if arrival == "all" else 2 * f)
            if arrival == "adversarial":
                draw = stream(0, i, t).uniform("arrival", len(heard), dtype=torch.float64)[0].tolist()
                others = [j for j in heard if j != i and j not in byzantine]
                lost = sorted(others, key=lambda j: draw[heard.index(j)])[:f]
                heard = [j for j in heard if j not in lost]
            theta[i] = nearest(sent, i, heard, keep)
        path.append(torch.stack(theta))
    return torch.stack(path)


def dsgd(clients: Clients, x0: Tensor, rounds: int, *, lr: float, weights: Weights) -> Tensor:
    """[rounds, n, P]: the nodes' models after every round; `weights(t)` is W [n, n] of round t."""
    n = clients.n
    theta, path = [x0.clone() for _ in range(n)], []
    for t in range(rounds):
        h = [theta[i] - lr * clients.gradient(i, theta[i], t, 0) for i in range(n)]
        theta = mixed(weights(t), h)
        path.append(torch.stack(theta))
    return torch.stack(path)


def gradient_tracking(clients: Clients, x0: Tensor, rounds: int, *, lr: float, weights: Weights) -> Tensor:
    """[rounds, n, P]: x <- W (x - lr y), y <- W y + g(x) - g(x before)."""
    n = clients.n
    x, path = [x0.clone() for _ in range(n)], []
    y = g = [torch.zeros_like(x0) for _ in range(n)]
    for t in range(rounds):
        new = [clients.gradient(i, x[i], t, 0) for i in range(n)]
        y = [y[i] + new[i] - g[i] for i in range(n)]
        g = new
        x = mixed(weights(t), [x[i] - lr * y[i] for i in range(n)])
        y = mixed(weights(t), y)
        path.append(torch.stack(x))
    return torch.stack(path)


def clipped_gossip(
    clients: Clients,
    x0: Tensor,
    rounds: int,
    *,
    lr: float,
    beta: float,
    f: int,
    weights: Weights,
    tau: float | None = None,
    byzantine: Sequence[int] = (),
    attack: Lie = flipped,
) -> Tensor:
    """[rounds, n, P]: h_i + sum_j W_ij clip(h_j - h_i, tau_i)."""
    n = clients.n
    theta, path = [x0.clone() for _ in range(n)], []
    m = [torch.zeros_like(x0) for _ in range(n)]
    for t in range(rounds):
        w = weights(t)
        m = [beta * m[i] + (1 - beta) * clients.gradient(i, theta[i], t, 0) for i in range(n)]
        h = [theta[i] - lr * m[i] for i in range(n)]
        sent = told(h, byzantine, attack)
        for i in range(n):
            theta[i] = clipped(sent, i, w[i], f, tau)
        path.append(torch.stack(theta))
    return torch.stack(path)


def bridge(
    clients: Clients,
    x0: Tensor,
    rounds: int,
    *,
    lr: float,
    f: int,
    weights: Weights,
    byzantine: Sequence[int] = (),
    attack: Lie = flipped,
) -> Tensor:
    """[rounds, n, P]: BRIDGE-T, the trimmed mean of neighbours' models and one's own, less lr times the gradient."""
    n = clients.n
    w, path = [x0.clone() for _ in range(n)], []
    for t in range(rounds):
        sent, new = told(w, byzantine, attack), []
        for i in range(n):
            new.append(trimmed(sent, i, weights(t)[i], f) - lr * clients.gradient(i, w[i], t, 0))
        w = new
        path.append(torch.stack(w))
    return torch.stack(path)


def nearest(sent: Sequence[Tensor], i: int, heard: Sequence[int], keep: int) -> Tensor:
    """The mean of the `keep` vectors nearest to node i's own among those that it heard; ties to the lower node."""
    near = sorted(heard, key=lambda j: (float((sent[j] - sent[i]).norm()), j))[:keep]
    return sum((sent[j] for j in near), start=torch.zeros_like(sent[i])) / keep


def clipped(sent: Sequence[Tensor], i: int, w: Tensor, f: int, tau: float | None) -> Tensor:
    """What node i makes of its neighbours, which weigh w [n], by clipped gossip."""
    near = [j for j in range(len(sent)) if j != i and w[j] > 0]
    away = {j: sent[j] - sent[i] for j in near}
    radius = tau
    if radius is None:
        trusted = sorted(near, key=lambda j: float(away[j].norm()))[: len(near) - f]
        delta = sum(sorted((float(w[j]) for j in near), reverse=True)[:f])
        whole = sum(float(w[j]) * float(away[j].norm()) ** 2 for j in trusted)
        radius = (whole / delta) ** 0.5 if f else float("inf")
    cut = {j: v * min(1.0, radius / max(float(v.norm()), 1e-300)) for j, v in away.items()}
    return sent[i] + sum((w[j] * cut[j] for j in near), start=torch.zeros_like(sent[i]))


def trimmed(sent: Sequence[Tensor], i: int, w: Tensor, f: int) -> Tensor:
    """The trimmed mean of what node i hears, those of weight w [n] above zero."""
    heard = torch.stack([sent[j] for j in range(len(sent)) if w[j] > 0]).sort(0).values
    return heard[f : len(heard) - f].mean(0)


def told(v: Sequence[Tensor], byzantine: Sequence[int], attack: Lie) -> list[Tensor]:
    """What each node sends: its own v_i, and all faulty ones attack(mean of the correct v_i)."""
    lie = attack(torch.stack([row for i, row in enumerate(v) if i not in byzantine]).mean(0))
    return [lie if i in byzantine else row for i, row in enumerate(v)]


def mixed(w: Tensor, v: Sequence[Tensor]) -> list[Tensor]:
    """sum_j W_ij v_j for every node i."""
    return [sum((w[i, j] * v[j] for j in range(len(v))), start=torch.zeros_like(v[0])) for i in range(len(v))]
