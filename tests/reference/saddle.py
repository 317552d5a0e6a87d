"""MASHA1, MASHA2 and extragradient, device after device, as the algorithm boxes write them.

Letters: M devices, z the iterate, w the reference, F the mean of the devices' operators F_m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.streams import server_rng

Compress = Callable[[Tensor, int, int], Tensor]
"""(vector, device, the device's job) -> what arrives."""


class Devices(Protocol):
    n: int

    def full(self, i: int, z: Tensor) -> Tensor: ...

    def gradient(self, i: int, y: Tensor, job: int, step: int) -> Tensor: ...


def identity(v: Tensor, device: int, job: int) -> Tensor:
    return v


def top(k: int) -> Compress:
    """The k largest entries by magnitude, the first of equal ones."""

    def compress(v: Tensor, device: int, job: int) -> Tensor:
        order = sorted(range(len(v)), key=lambda j: (-abs(float(v[j])), j))[:k]
        out = torch.zeros_like(v)
        out[order] = v[order]
        return out

    return compress


def extragradient(devices: Devices, z: Tensor, iterations: int, *, lr: float) -> Tensor:
    """[iterations, P]."""
    path = []
    for _ in range(iterations):
        half = z - lr * _mean(devices, z)
        z = z - lr * _mean(devices, half)
        path.append(z)
    return torch.stack(path)


def optimistic_gradient(devices: Devices, z: Tensor, iterations: int, *, lr: float) -> Tensor:
    """[iterations, P]; the operator before the first is the first."""
    path, last = [], _mean(devices, z)
    for _ in range(iterations):
        now = _mean(devices, z)
        z, last = z - 2 * lr * now + lr * last, now
        path.append(z)
    return torch.stack(path)


def masha1(
    devices: Devices,
    z: Tensor,
    iterations: int,
    *,
    lr: float,
    p: float,
    compress: Compress = identity,
    compress_server: Callable[[Tensor, int, int], Tensor] = lambda v, key, iteration: v,
    size: int | None = None,
    minibatch: bool = False,
) -> Tensor:
    """[iterations, P]; a device's jobs: two for a refresh, then in every iteration one up, if asked, and one down."""
    w, fw, jobs = z, _mean(devices, z), [2] * devices.n
    path = []
    for k in range(iterations):
        rng, asked = _asked(devices, k, size)
        key, coin = int(rng.integers(1 << 62)), rng.random() < p
        anchor = (1 - p) * z + p * w
        half = anchor - lr * fw
        sent = [compress(_difference(devices, m, half, w, jobs[m], minibatch), m, jobs[m]) for m in asked]
        v = compress_server(torch.stack(sent).mean(0), key, k)
        z = anchor - lr * (v + fw)
        jobs = [jobs[m] + (m in asked) + 1 + 2 * coin for m in range(devices.n)]
        if coin:
            w, fw = z, _mean(devices, z)
        path.append(z)
    return torch.stack(path)


def masha2(
    devices: Devices,
    z: Tensor,
    iterations: int,
    *,
    lr: float,
    p: float,
    compress: Compress = identity,
    compress_server: Compress = identity,
    size: int | None = None,
    minibatch: bool = False,
) -> Tensor:
    """[iterations, P], with error feedback on both sides; jobs as in masha1."""
    w, fw, jobs = z, _mean(devices, z), [2] * devices.n
    error, server_error = [torch.zeros_like(z) for _ in range(devices.n)], torch.zeros_like(z)
    path = []
    for k in range(iterations):
        rng, asked = _asked(devices, k, size)
        rng.integers(1 << 62)  # the server's compressor has a draw of its own
        coin = rng.random() < p
        anchor = (1 - p) * z + p * w
        half = anchor - lr * fw
        sent = []
        for m in asked:
            u = lr * _difference(devices, m, half, w, jobs[m], minibatch) + error[m]
            sent.append(compress(u, m, jobs[m]))
            error[m] = u - sent[-1]
        u = torch.stack(sent).mean(0) + server_error
        c = compress_server(u, -1, k)
        server_error = u - c
        z = anchor - lr * fw - c
        jobs = [jobs[m] + (m in asked) + 1 + 2 * coin for m in range(devices.n)]
        if coin:
            w, fw = z, _mean(devices, z)
        path.append(z)
    return torch.stack(path)


def _mean(devices: Devices, z: Tensor) -> Tensor:
    return torch.stack([devices.full(m, z) for m in range(devices.n)]).mean(0)


def _asked(devices: Devices, iteration: int, size: int | None) -> tuple[np.random.Generator, list[int]]:
    """(the server's random numbers, who sends a difference)."""
    rng = server_rng(0, "server", iteration)
    if size is None:
        return rng, list(range(devices.n))
    return rng, sorted(rng.choice(devices.n, size=size, replace=False).tolist())


def _difference(devices: Devices, m: int, z: Tensor, w: Tensor, job: int, minibatch: bool) -> Tensor:
    """F_m(z) - F_m(w), of all samples or of one minibatch."""
    if minibatch:
        return devices.gradient(m, z, job, 0) - devices.gradient(m, w, job, 0)
    return devices.full(m, z) - devices.full(m, w)
