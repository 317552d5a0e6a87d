"""A picture and measurements of the same patient: a model with two inputs, a loss that weighs the rare answer more, and
rows that every hospital holds out for its own model."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from fedsim.data import Dataset, from_arrays


def patients(seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    n = 300
    scan, blood = rng.normal(size=(n, 1, 6, 6)), rng.normal(size=(n, 3))
    ill = scan.mean((1, 2, 3)) * 6 + blood[:, 0] > 1.2
    hospital = rng.integers(8, size=n)
    later = np.arange(n) >= 240

    def some(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"scan": scan[rows], "blood": blood[rows]}

    return from_arrays(
        some(~later),
        ill[~later].astype(float),
        some(later),
        ill[later].astype(float),
        clients=hospital[~later],
        test_clients=hospital[later],
    )


class Both(nn.Module):
    def __init__(self, input_shape: dict[str, tuple[int, ...]], width: int = 8) -> None:
        super().__init__()
        self.scan = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(width + input_shape["blood"][0], width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, scan: Tensor, blood: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.scan(scan)
        return self.head(torch.cat([seen, blood], 1)).squeeze(1), seen


def weighted(logits: Tensor, ill: Tensor, *, weight: float = 1.0) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, ill, reduction="none") * (1 + (weight - 1) * ill)


def found(logits: Tensor, ill: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the ill that are found."""
    return ((logits > 0) & (ill > 0)).float(), ill


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 10,
            "task": {
                "name": "supervised",
                "dataset": f"{__name__}:patients",
                "model": f"{__name__}:Both",
                "loss": {"name": f"{__name__}:weighted", "weight": 3.0},
                "metrics": ["label_accuracy", f"{__name__}:found"],
            },
            "partition": "natural",
            "strategy": "fedavg",
            "evaluate": {"every": 10},
            "local": {"epochs": 2, "batch_size": 10, "optimizer": {"name": "adam", "lr": 0.01}},
        }
    )
