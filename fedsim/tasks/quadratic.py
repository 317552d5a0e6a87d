"""Quadratic clients, whose answers are known: f_i(x) = 1/2 (x - b_i)' A_i (x - b_i).

The workhorse of the tests: the minimiser of the mean is x* = (sum A_i)^-1 sum A_i b_i, and most methods have a
closed-form limit on it. With noise 0 the field is exact and `local.batch_size` changes nothing.

Letters: N clients, C clients of a stack, d dimensions (P = d).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.params import Layout
from fedsim.streams import server_rng
from fedsim.task import Constants, Pool
from fedsim.tasks.formula import FormulaTask

Numbers = float | tuple[float, ...] | tuple[tuple[float, ...], ...] | tuple[tuple[tuple[float, ...], ...], ...]


class QuadraticTask(FormulaTask):
    """See the module's head.

    Args:
        a: [N] numbers, [N, d] diagonals or [N, d, d] matrices: each client's curvature.
        b: [N] or [N, d]: each client's minimiser.
        x0: [d] where training starts.
        noise: standard deviation of keyed Gaussian noise added to every entry of every local gradient.
        num_examples: [N] weights of the clients; one each by default.
    """

    def __init__(
        self, a: Tensor, b: Tensor, x0: Tensor, noise: float = 0.0, num_examples: Tensor | None = None
    ) -> None:
        b = b[:, None] if b.ndim == 1 else b
        a = a[:, None].expand(-1, b.shape[1]) if a.ndim == 1 else a
        if a.shape[0] != b.shape[0] or a.shape[-1] != b.shape[1] or x0.shape != (b.shape[1],):
            raise ValueError(
                f"task.a {tuple(a.shape)}, task.b {tuple(b.shape)} and task.x0 {tuple(x0.shape)} do not fit: "
                "give one entry per client in a and b, and one number per dimension in x0"
            )
        self.a, self.b, self.x0, self.noise = a, b, x0, noise
        self.layout = Layout.of({"x": (b.shape[1],)})
        self.num_examples = torch.ones(len(b), dtype=torch.int64) if num_examples is None else num_examples

    @classmethod
    def drawn(cls, num_clients: int, dim: int, seed: int, *, spread: float = 1.0, noise: float = 0.0) -> QuadraticTask:
        """Random diagonal curvatures in [0.5, 2] and minimisers N(0, spread^2), keyed by the seed."""
        rng = server_rng(seed, "quadratic")
        a = torch.from_numpy(rng.uniform(0.5, 2.0, (num_clients, dim))).float()
        b = torch.from_numpy(rng.normal(0.0, spread, (num_clients, dim))).float()
        return cls(a, b, torch.zeros(dim), noise)

    def to(self, device: torch.device) -> QuadraticTask:
        """The same task with its constants on a device."""
        moved = [t.to(device) for t in (self.a, self.b, self.x0)]
        return QuadraticTask(moved[0], moved[1], moved[2], self.noise, self.num_examples)

    @property
    def constants(self) -> Constants:
        a = self.a.double().cpu()
        own, mean = (t if a.ndim == 2 else torch.linalg.eigvalsh(t) for t in (a, a.mean(0)))
        return Constants(own.amax(1), float(mean.max()), float(mean.min()), potential=True)

    def solution(self) -> Tensor:
        """[d] float64: the minimiser of the sum, weighted by the clients' examples."""
        w = self.num_examples.to(self.a.device, torch.float64)
        a, b = self.a.double(), self.b.double()
        if a.ndim == 2:
            return (w[:, None] * a * b).sum(0) / (w[:, None] * a).sum(0)
        rhs = torch.einsum("n,nij,nj->i", w, a, b)
        return torch.linalg.solve(torch.einsum("n,nij->ij", w, a), rhs)

    def init(self, seed: int) -> Tensor:
        return self.x0.clone()

    def formula(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        away = x - self.b[rows].to(x.dtype)
        g = self.curvature(away, rows)
        return g, 0.5 * (g * away).sum(1)

    def curvature(self, v: Tensor, rows: Tensor) -> Tensor:
        a = self.a[rows].to(v.dtype)
        return a * v if a.ndim == 2 else torch.einsum("kij,kj->ki", a, v)

    def lacks(self, need: str) -> str | None:
        return "a quadratic has no labels" if need == "sampled_grad" else None

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        losses = self.evaluate_clients(x, pool)["loss"]
        w = self.num_examples.to(losses)
        return {
            "test_loss": float((w * losses).nansum() / w.sum()),
            "distance": float(torch.linalg.vector_norm(x.double() - self.solution())),
        }

    def evaluate_clients(self, x: Tensor, pool: Pool) -> dict[str, Tensor]:
        losses = self.formula(x.double().expand(len(self.b), -1), torch.arange(len(self.b), device=x.device))[1]
        return {"loss": losses.cpu().masked_fill(self.num_examples == 0, torch.nan)}
