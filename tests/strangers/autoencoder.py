"""A variational autoencoder: no labels, the target of a sample is the sample itself, and the latent code is drawn."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from fedsim.data import Dataset, from_arrays

PIXELS, CODE = 16, 2


def strokes(seed: int = 0) -> Dataset:
    """Rows of pixels with a bump at some place and of some width: two numbers say it all."""
    rng = np.random.default_rng(seed)
    place, width = rng.uniform(3, PIXELS - 3, (400, 1)), rng.uniform(1, 3, (400, 1))
    x = np.exp(-(((np.arange(PIXELS) - place) / width) ** 2)).astype(np.float32)
    return from_arrays(x[:320], x[:320], x[320:], x[320:])


class VAE(nn.Module):
    """Gives the reconstruction, and mean and log variance of the code, beside each other."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, width), nn.Tanh(), nn.Linear(width, 2 * CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, width), nn.Tanh(), nn.Linear(width, PIXELS))

    def forward(self, x: Tensor) -> Tensor:
        mean, log_var = self.encoder(x).chunk(2, -1)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return torch.cat([self.decoder(code), mean, log_var], -1)


def elbo(outputs: Tensor, x: Tensor, *, beta: float = 1.0) -> Tensor:
    """The negative evidence lower bound of a Gaussian decoder with variance 0.01, for each sample."""
    seen, mean, log_var = outputs.split([PIXELS, CODE, CODE], -1)
    divergence = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)
    return 50 * (seen - x).square().sum(-1) + beta * divergence


def reconstruction_error(outputs: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(outputs[:, :PIXELS], x, reduction="none").mean(-1)


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 8,
            "task": {"name": "supervised", "loss": {"name": elbo, "beta": 0.5}, "metrics": [reconstruction_error]},
            "clients": {"count": 5},
            "local": {"epochs": 3, "batch_size": 20, "optimizer": {"name": "adam", "lr": 0.02}},
            "evaluate": {"every": 8},
        },
        model=VAE,
        data=strokes,
        strategy="fedavg",
    )
