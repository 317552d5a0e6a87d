"""Asynchronous schemes as event loops over lists: who returns when, and what the server does then.

Letters: M clients, R_i the time at which client i returns, tau_i how long its job takes, d_i its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsim.streams import server_rng
from tests.reference.clients import Clients


@dataclass
class Trace:
    """What happened: models [P], times, contributors and their staleness, aggregation by aggregation."""

    x: list[Tensor] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    who: list[list[int]] = field(default_factory=list)
    staleness: list[list[int]] = field(default_factory=list)

    def path(self) -> Tensor:
        return torch.stack(self.x)


class Workers:
    """What every client holds: the model it was sent, when, and when it returns."""

    def __init__(self, clients: Clients, x: Tensor, tau: Callable[[int, int], float], eta: float) -> None:
        self.clients, self.tau, self.eta = clients, tau, eta
        self.sent = [x] * clients.n
        self.since = [0] * clients.n
        self.jobs = [0] * clients.n
        self.back = [tau(i, 0) for i in range(clients.n)]

    def change(self, i: int) -> Tensor:
        """y_i^K minus the model that client i received."""
        y = self.sent[i].clone()
        for k in range(self.clients.steps(i)):
            y = y - self.eta * self.clients.gradient(i, y, self.jobs[i], k)
        return y - self.sent[i]

    def restart(self, i: int, x: Tensor, aggregation: int, now: float) -> None:
        self.jobs[i] += 1
        self.sent[i], self.since[i] = x, aggregation
        self.back[i] = now + self.tau(i, self.jobs[i])


def constant(tau: Sequence[float]) -> Callable[[int, int], float]:
    """Job times that never vary."""
    return lambda client, job: float(tau[client])


def async_fedavg(
    clients: Clients, x: Tensor, aggregations: int, *, tau: Callable[[int, int], float], d: Sequence[float], eta: float
) -> Trace:
    """The first to return contributes and starts again."""
    work, out = Workers(clients, x, tau, eta), Trace()
    for n in range(aggregations):
        i = min(range(clients.n), key=lambda j: (work.back[j], work.since[j], j))
        now = work.back[i]
        x = x + d[i] * work.change(i)
        _note(out, x, now, [i], [n - work.since[i]])
        work.restart(i, x, n + 1, now)
    return out


def fedasync(
    clients: Clients,
    x: Tensor,
    aggregations: int,
    *,
    tau: Callable[[int, int], float],
    alpha: float,
    trust: Callable[[int], float],
    eta: float,
) -> Trace:
    """The model of the first to return is mixed into the server's, and that client starts again."""
    work, out = Workers(clients, x, tau, eta), Trace()
    for n in range(aggregations):
        i = min(range(clients.n), key=lambda j: (work.back[j], work.since[j], j))
        now, late = work.back[i], n - work.since[i]
        mix = alpha * trust(late)
        x = (1 - mix) * x + mix * (work.sent[i] + work.change(i))
        _note(out, x, now, [i], [late])
        work.restart(i, x, n + 1, now)
    return out


def fedfix(
    clients: Clients,
    x: Tensor,
    windows: int,
    *,
    tau: Callable[[int, int], float],
    d: Sequence[float],
    interval: float,
    eta: float,
) -> Trace:
    """Whoever returned by the window's end contributes, and starts again then."""
    work, out = Workers(clients, x, tau, eta), Trace()
    for n in range(windows):
        now = (n + 1) * interval
        who = [i for i in range(clients.n) if work.back[i] <= now + 1e-9]
        late = [n - work.since[i] for i in who]
        x = x + sum((d[i] * work.change(i) for i in who), start=torch.zeros_like(x))
        _note(out, x, now, who, late)
        for i in who:
            work.restart(i, x, n + 1, now)
    return out


def fedbuff(
    clients: Clients,
    x: Tensor,
    aggregations: int,
    *,
    tau: Callable[[int, int], float],
    d: Sequence[float],
    size: int,
    eta: float,
) -> Trace:
    """The first `size` to return contribute, and start again together."""
    work, out = Workers(clients, x, tau, eta), Trace()
    for n in range(aggregations):
        who = sorted(range(clients.n), key=lambda j: (work.back[j], work.since[j], j))[:size]
        now = max(work.back[i] for i in who)
        late = [n - work.since[i] for i in who]
        x = x + sum((d[i] * work.change(i) for i in who), start=torch.zeros_like(x))
        _note(out, x, now, who, late)
        for i in who:
            work.restart(i, x, n + 1, now)
    return out


def fedbuff_stream(
    clients: Clients,
    x: Tensor,
    aggregations: int,
    *,
    tau: Callable[[int, int], float],
    size: int,
    concurrency: int,
    exponent: float,
    eta: float,
) -> Trace:
    """Keep `concurrency` clients at work; step when `size` have returned, each scaled by (1 + staleness)^-exponent."""
    out = Trace()
    busy: dict[int, tuple[float, int, int, Tensor, int]] = {}  # client: returns at, place in line, job, model, version
    jobs, line, now = [0] * clients.n, 0, 0.0
    for n in range(aggregations):
        rng = server_rng(0, "server", n)
        total = torch.zeros_like(x)
        who, late = [], []
        for _ in range(size):
            idle = [i for i in range(clients.n) if i not in busy]
            free = concurrency - len(busy)
            picked = idle if free == len(idle) else sorted(idle[j] for j in rng.choice(len(idle), free, replace=False))
            for i in picked:
                busy[i] = (now + tau(i, jobs[i]), line, jobs[i], x, n)
                jobs[i], line = jobs[i] + 1, line + 1
            i = min(busy, key=lambda j: busy[j][:2])
            now, _, job, start, version = busy.pop(i)
            y = start.clone()
            for k in range(clients.steps(i)):
                y = y - eta * clients.gradient(i, y, job, k)
            total += (1 + n - version) ** -exponent * (y - start)
            who.append(i)
            late.append(n - version)
        x = x + total / size
        _note(out, x, now, who, late)
    return out


def _note(out: Trace, x: Tensor, now: float, who: list[int], late: list[int]) -> None:
    out.x.append(x)
    out.time.append(now)
    out.who.append(who)
    out.staleness.append(late)
