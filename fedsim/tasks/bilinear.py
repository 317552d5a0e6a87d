"""Bilinear saddle points min_x max_y f, f = mean of f_m, whose solution is known.

    f_m(x, y) = x' A_m y + a_m' x + b_m' y + lam/2 (|x|^2 - |y|^2)
    F_m(z) = (lam x + A_m y + a_m, lam y - A_m' x - b_m), z = (x, y)

The test problem of Beznosikov et al., arXiv:2110.03313. With A_m = Q_m diag(s) Q_m' of one positive spectrum s the
mean A stays well conditioned however many clients there are; Gaussian A_m would average out.

Letters: M clients, C clients of a stack, h half dimension, P = 2h.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedsim.params import Layout
from fedsim.prox import FREE, Each, Prox, solve
from fedsim.streams import server_rng
from fedsim.task import Constants, Pool
from fedsim.tasks.formula import FormulaTask


class BilinearTask(FormulaTask):
    """See the module's head.

    Args:
        matrix: [M, h, h], A_m.
        a, b: [M, h].
        lam: strong monotonicity; 0 is purely bilinear.
        noise: standard deviation of keyed Gaussian noise on every entry of the operator.
        prox: of x and of y, each by itself: a set to stay in or a penalty; None for none.
    """

    def __init__(
        self, matrix: Tensor, a: Tensor, b: Tensor, lam: float = 0.0, noise: float = 0.0, prox: Prox | None = None
    ) -> None:
        m, h, _ = matrix.shape
        if matrix.shape[2] != h or a.shape != (m, h) or b.shape != (m, h):
            raise ValueError(f"A {tuple(matrix.shape)}, a {tuple(a.shape)} and b {tuple(b.shape)} do not fit")
        self.matrix, self.a, self.b, self.lam, self.noise = matrix, a, b, lam, noise
        self.layout = Layout.of({"x": (h,), "y": (h,)})
        self._prox, self.prox = prox, FREE if prox is None else Each(self.layout, {"x": prox, "y": prox})
        if not lam:
            self.no_local_steps = (
                "local steps along a bilinear operator spiral away from the saddle point; set task.lam above 0, or use "
                "extragradient, masha1 or masha2"
            )
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
        prox: Prox | None = None,
    ) -> BilinearTask:
        """Random rotations of the spectrum linspace(low, high), and Gaussian a_m and b_m, keyed by the seed."""
        rng = server_rng(seed, "bilinear")
        q, _ = np.linalg.qr(rng.normal(size=(num_clients, dim, dim)))
        matrix = (q * np.linspace(low, high, dim)) @ q.transpose(0, 2, 1)
        a, b = rng.normal(size=(2, num_clients, dim))
        tensors = [torch.from_numpy(v).float() for v in (matrix, a, b)]
        return cls(tensors[0], tensors[1], tensors[2], lam, noise, prox)

    def to(self, device: torch.device) -> BilinearTask:
        """The same task with its constants on a device."""
        moved = [t.to(device) for t in (self.matrix, self.a, self.b)]
        return BilinearTask(moved[0], moved[1], moved[2], self.lam, self.noise, self._prox)

    @cached_property
    def constants(self) -> Constants:
        own = torch.linalg.matrix_norm(self.matrix.double(), ord=2).cpu()
        mean = float(torch.linalg.matrix_norm(self.matrix.double().mean(0), ord=2))
        return Constants((self.lam**2 + own**2).sqrt(), (self.lam**2 + mean**2) ** 0.5, self.lam)

    def solution(self) -> Tensor:
        """[P] float64: z* of the mean problem."""
        return self._solution

    @cached_property
    def _solution(self) -> Tensor:
        """From J z* = -c, or with a prox by extragradient."""
        h = self.a.shape[1]
        mean = self.matrix.double().mean(0)
        eye = self.lam * torch.eye(h, dtype=torch.float64, device=mean.device)
        jacobian = torch.cat([torch.cat([eye, mean], 1), torch.cat([-mean.T, eye], 1)])
        c = torch.cat([self.a.double().mean(0), -self.b.double().mean(0)])
        if self.prox == FREE:
            return torch.linalg.solve(jacobian, -c)
        return solve(lambda z: jacobian @ z + c, torch.zeros_like(c), self.prox, 0.5 / self.constants.of_mean)

    def init(self, seed: int) -> Tensor:
        return torch.zeros(self.layout.size, dtype=self.a.dtype, device=self.a.device)

    def formula(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        matrix, a, b = (t[rows].to(x.dtype) for t in (self.matrix, self.a, self.b))
        u, v = x.chunk(2, dim=1)
        av = torch.einsum("cij,cj->ci", matrix, v)
        f = torch.cat([self.lam * u + av + a, self.lam * v - torch.einsum("cij,ci->cj", matrix, u) - b], dim=1)
        value = (u * av).sum(1) + (a * u).sum(1) + (b * v).sum(1) + self.lam / 2 * (u.square() - v.square()).sum(1)
        return f, value

    def curvature(self, v: Tensor, rows: Tensor) -> Tensor:
        a, (p, q) = self.matrix[rows].to(v), v.chunk(2, dim=1)
        av, ap = torch.einsum("kij,kj->ki", a, q), torch.einsum("kij,ki->kj", a, p)
        return torch.cat([self.lam * p + av, self.lam * q - ap], dim=1)

    def lacks(self, need: str) -> str | None:
        missing = {"sampled_grad": "a saddle point has no labels", "loss_eval": "a saddle point is not minimised"}
        return missing.get(need)

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        return {"distance": float(torch.linalg.vector_norm(x.double() - self.solution()))}
