"""Bilinear saddle points min_x max_y f, f = mean of f_m, whose solution is known.

    f_m(x, y) = x' A_m y + a_m' x + b_m' y + lam/2 (|x|^2 - |y|^2)
    F_m(z) = (lam x + A_m y + a_m, lam y - A_m' x - b_m), z = (x, y)

The test problem of Beznosikov et al., arXiv:2110.03313. With A_m = Q_m diag(s) Q_m' of one positive spectrum s the
mean A stays well conditioned however many clients there are; Gaussian A_m would average out.

Letters: M clients, C clients of a stack, h half dimension, P = 2h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.cohort import Cohort
from fedsim.params import Layout
from fedsim.streams import Streams, server_rng
from fedsim.task import PlainSession, Pool, Schedule, Session
from fedsim.tasks.steps import OwnFunction


@dataclass(frozen=True)
class SaddleBatch:
    """Which clients, and the key of their noise."""

    rows: Tensor
    streams: Streams
    step: int


class BilinearTask:
    """See the module's head.

    Args:
        matrix: [M, h, h], A_m.
        a, b: [M, h].
        lam: strong monotonicity; 0 is purely bilinear.
        noise: standard deviation of keyed Gaussian noise on every entry of the operator.
    """

    def __init__(self, matrix: Tensor, a: Tensor, b: Tensor, lam: float = 0.0, noise: float = 0.0) -> None:
        m, h, _ = matrix.shape
        if matrix.shape[2] != h or a.shape != (m, h) or b.shape != (m, h):
            raise ValueError(f"A {tuple(matrix.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)} do not fit")
        self.matrix, self.a, self.b, self.lam, self.noise = matrix, a, b, lam, noise
        self.layout = Layout.of({"x": (h,), "y": (h,)})
        self.num_examples = torch.ones(m, dtype=torch.int64)

    @classmethod
    def drawn(
        cls,
        num_clients: int,
        dim: int,
        seed: int,
        *,
        low: float = 0.5,
        high: float = 2.0,
        lam: float = 0.0,
        noise: float = 0.0,
    ) -> BilinearTask:
        """Random rotations of the spectrum linspace(low, high), and Gaussian a_m and b_m, keyed by the seed."""
        rng = server_rng(seed, "bilinear")
        q, _ = np.linalg.qr(rng.normal(size=(num_clients, dim, dim)))
        matrix = (q * np.linspace(low, high, dim)) @ q.transpose(0, 2, 1)
        a, b = rng.normal(size=(2, num_clients, dim))
        tensors = [torch.from_numpy(v).float() for v in (matrix, a, b)]
        return cls(tensors[0], tensors[1], tensors[2], lam, noise)

    def to(self, device: torch.device) -> BilinearTask:
        """The same task with its constants on a device."""
        return BilinearTask(self.matrix.to(device), self.a.to(device), self.b.to(device), self.lam, self.noise)

    def solution(self) -> Tensor:
        """[P] float64: z* of the mean problem, J z* = -c."""
        h = self.a.shape[1]
        mean = self.matrix.double().mean(0)
        eye = self.lam * torch.eye(h, dtype=torch.float64, device=mean.device)
        jacobian = torch.cat([torch.cat([eye, mean], 1), torch.cat([-mean.T, eye], 1)])
        c = torch.cat([self.a.double().mean(0), -self.b.double().mean(0)])
        return torch.linalg.solve(jacobian, -c)

    def init(self, seed: int) -> Tensor:
        return torch.zeros(self.layout.size)

    def batches(self, cohort: Cohort, schedule: Schedule) -> OwnFunction:
        streams = cohort.streams
        return OwnFunction(cohort, schedule, lambda step, k: SaddleBatch(cohort.ids[:k], streams.rows(slice(k)), step))

    def batch_sizes(self, batch: SaddleBatch) -> Tensor:
        return torch.ones(len(batch.rows), dtype=torch.int64)

    def field(self, x: Tensor, batch: SaddleBatch, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = batch.rows
        matrix, a, b = (t[rows].to(x.dtype) for t in (self.matrix, self.a, self.b))
        u, v = x.chunk(2, dim=1)
        av = torch.einsum("cij,cj->ci", matrix, v)
        f = torch.cat([self.lam * u + av + a, self.lam * v - torch.einsum("cij,ci->cj", matrix, u) - b], dim=1)
        value = (u * av).sum(1) + (a * u).sum(1) + (b * v).sum(1) + self.lam / 2 * (u.square() - v.square()).sum(1)
        if self.noise:
            f = f + self.noise * batch.streams.normal("noise", x.shape[1], step=batch.step)
        return (f if out is None else out.copy_(f)), value

    def plain_run(
        self, x: Tensor, batches: OwnFunction, lr: float, scale: float = 1.0, terms: Sequence[tuple[float, Tensor]] = ()
    ) -> None:
        """None: steps are taken one by one."""
        return None

    def session(self, x: Tensor) -> Session:
        return PlainSession(self.field, x)

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        return {"distance": float(torch.linalg.vector_norm(x.double() - self.solution()))}

    def evaluate_clients(self, x: Tensor, pool: Pool) -> dict[str, Tensor]:
        """{}: a saddle point's clients have no loss of their own to be minimised."""
        return {}
