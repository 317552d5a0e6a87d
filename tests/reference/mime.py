"""Mime and MimeLite, one client after the other, with heavy ball or Adam written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.clients import Clients, cohort

Full = Callable[[int, Tensor, int], Tensor]
"""(client, x, job) -> its gradient over all of its data."""


@dataclass
class HeavyBall:
    """U(g, m) = V(g, m) = (1 - b) g + b m."""

    b: float
    m: Tensor

    def step(self, g: Tensor) -> Tensor:
        return (1 - self.b) * g + self.b * self.m

    def learn(self, c: Tensor) -> None:
        self.m = self.step(c)


@dataclass
class Adam:
    """The step that Adam takes next from (m, v, t), whose second moment holds the step's own gradient."""

    m: Tensor
    v: Tensor
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    t: int = field(default=0)

    def _next(self, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.b1 * self.m + (1 - self.b1) * g, self.b2 * self.v + (1 - self.b2) * g * g

    def step(self, g: Tensor) -> Tensor:
        m, v = self._next(g)
        t = self.t + 1
        return m / (1 - self.b1**t) / ((v / (1 - self.b2**t)).sqrt() + self.eps)

    def learn(self, c: Tensor) -> None:
        self.m, self.v = self._next(c)
        self.t += 1


def mime(
    clients: Clients,
    x: Tensor,
    rounds: int,
    *,
    eta: float,
    base: HeavyBall | Adam,
    full: Full,
    lite: bool = False,
    server_lr: float = 1.0,
    size: int | None = None,
) -> Tensor:
    """[rounds, P]: the server's model after every round."""
    jobs = [0] * clients.n
    path = []
    for r in range(rounds):
        chosen = cohort(r, clients.n, size)
        c = sum((full(i, x, jobs[i]) for i in chosen), start=torch.zeros_like(x)) / len(chosen)
        mean = torch.zeros_like(x)
        for i in chosen:
            y = x.clone()
            for k in range(clients.steps(i)):
                h = clients.gradient(i, y, jobs[i], k)
                if not lite:
                    h = h - clients.gradient(i, x, jobs[i], k) + c
                y = y - eta * base.step(h)
            jobs[i] += 1
            mean += y / len(chosen)
        base.learn(c)
        x = x - server_lr * (x - mean)
        path.append(x)
    return torch.stack(path)
