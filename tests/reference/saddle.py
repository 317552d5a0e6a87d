"""MASHA1, MASHA2 and extragradient, device after device, as the algorithm boxes write them.

Letters: M devices, z the iterate, w the reference, F the mean of the devices' operators F_m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fedsim.streams import server_rng

Compress = Callable[[Tensor, int, int], Tensor]
"""(vector, device, the device's job) -> what arrives."""


class Devices(Protocol):
    n: int

    def full(self, i: int, z: Tensor) -> Tensor: ...


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


def masha1(
    devices: Devices,
    z: Tensor,
    iterations: int,
    *,
    lr: float,
    p: float,
    compress: Compress = identity,
    compress_server: Callable[[Tensor, int, int], Tensor] = lambda v, key, iteration: v,
    seed: int = 0,
) -> Tensor:
    """[iterations, P]; a device's jobs are: two for a refresh, then in every iteration one up and one down."""
    w, fw, job = z, _mean(devices, z), 2
    path = []
    for k in range(iterations):
        rng = server_rng(seed, "server", k)
        key, coin = int(rng.integers(1 << 62)), rng.random() < p
        anchor = (1 - p) * z + p * w
        half = anchor - lr * fw
        sent = [compress(devices.full(m, half) - devices.full(m, w), m, job) for m in range(devices.n)]
        v = compress_server(torch.stack(sent).mean(0), key, k)
        z = anchor - lr * (v + fw)
        job += 2
        if coin:
            w, fw, job = z, _mean(devices, z), job + 2
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
    seed: int = 0,
) -> Tensor:
    """[iterations, P], with error feedback on both sides."""
    w, fw = z, _mean(devices, z)
    error, server_error = [torch.zeros_like(z) for _ in range(devices.n)], torch.zeros_like(z)
    path = []
    for k in range(iterations):
        rng = server_rng(seed, "server", k)
        rng.integers(1 << 62)  # the server's compressor has a draw of its own
        coin = rng.random() < p
        anchor = (1 - p) * z + p * w
        half = anchor - lr * fw
        sent = []
        for m in range(devices.n):
            u = lr * (devices.full(m, half) - devices.full(m, w)) + error[m]
            sent.append(compress(u, m, k))
            error[m] = u - sent[m]
        u = torch.stack(sent).mean(0) + server_error
        c = compress_server(u, -1, k)
        server_error = u - c
        z = anchor - lr * fw - c
        if coin:
            w, fw = z, _mean(devices, z)
        path.append(z)
    return torch.stack(path)


def _mean(devices: Devices, z: Tensor) -> Tensor:
    return torch.stack([devices.full(m, z) for m in range(devices.n)]).mean(0)
