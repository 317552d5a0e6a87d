"""Pictures with bars, several or none in each: a torch Dataset, a residual network, and a metric of one's own."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedsim
from fedsim.data import from_samples

LABELS = 4


class Bars(Dataset[tuple[Tensor, Tensor]]):
    """Label k: there is a bright bar in row 2 k."""

    def __init__(self, length: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.labels = (torch.rand(length, LABELS, generator=g) < 0.4).long()
        self.pixels = 0.5 * torch.randn(length, 1, 8, 8, generator=g)
        self.pixels[:, 0, ::2] += self.labels[:, :, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.pixels[i], self.labels[i]


def bars() -> fedsim.Dataset:
    return from_samples(Bars(240, 0), Bars(80, 1))


class Residual(nn.Module):
    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.rows = nn.Conv2d(1, width, (1, 8))
        self.mix = nn.Linear(8 * width, 8 * width)
        self.norm = nn.LayerNorm(8 * width)
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rows(x).flatten(1)
        return self.head(self.norm(h + self.mix(h).relu()))


def macro_f1(outputs: Tensor, targets: Tensor) -> float:
    """The mean over labels of their F1 scores."""
    found, there = outputs > 0, targets > 0
    hits = (found & there).sum(0)
    return float((2 * hits / (found.sum(0) + there.sum(0)).clamp(min=1)).mean())


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 8,
            "task": {
                "name": "multilabel",
                "dataset": f"{__name__}:bars",
                "model": {"name": f"{__name__}:Residual", "width": 4},
                "metrics": ["exact_match", f"{__name__}:macro_f1"],
            },
            "clients": {"count": 12},
            "strategy": {"name": "fedavg", "cohort_size": 6},
            "evaluate": {"every": 8},
            "local": {"epochs": 1, "batch_size": 10, "optimizer": {"name": "adam", "lr": 0.01}},
        }
    )
