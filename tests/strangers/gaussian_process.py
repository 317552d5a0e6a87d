"""A sparse Gaussian process: inducing points that clients share, and a Cholesky factor in every forward pass."""

import math

import numpy as np
import torch
from torch import Tensor, nn

import fedsim


def stations(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hours, temperatures, stations), each of which measured a part of the week."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-3, 3, 400)
    y = np.sin(2 * x) + 0.3 * x + 0.1 * rng.normal(size=400)
    return x[:, None].astype(np.float32), y.astype(np.float32), np.digitize(x, np.linspace(-3, 3, 9)[1:-1])


class SparseGP(nn.Module):
    """Mean and log variance at x given values u at inducing points z, with a kernel exp(-|x - z|^2 / 2 l^2)."""

    def __init__(self, points: int = 14) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.linspace(-3, 3, points)[:, None])
        self.u = nn.Parameter(torch.zeros(points))
        self.log_length, self.log_noise = nn.Parameter(torch.tensor(-0.5)), nn.Parameter(torch.tensor(-1.0))

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.5 * (a[:, None] - b[None]).square().sum(-1) / torch.exp(2 * self.log_length))

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(self.kernel(self.z, self.z) + 1e-3 * torch.eye(len(self.z)))
        cross = torch.linalg.solve_triangular(factor, self.kernel(self.z, x), upper=False)
        weights = torch.linalg.solve_triangular(factor, self.u[:, None], upper=False)
        mean = (cross * weights).sum(0)
        variance = (1 - cross.square().sum(0)).clamp(min=1e-6) + self.log_noise.exp()
        return torch.stack([mean, variance.log()], -1)


def nll(outputs: Tensor, y: Tensor) -> Tensor:
    mean, log_var = outputs.unbind(-1)
    return 0.5 * (math.log(2 * math.pi) + log_var + (y - mean).square() / log_var.exp())


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs[:, 0] - y).square()


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 20,
            "task": {"name": "supervised", "loss": f"{__name__}:nll", "metrics": [f"{__name__}:squared_error"]},
            "strategy": "fedavg",
            "local": {"epochs": 2, "batch_size": 10, "optimizer": {"name": "adam", "lr": 0.05}},
            "evaluate": {"every": 20},
        },
        model=SparseGP,
        data=stations(),
    )
