"""A small ResNet with BatchNorm on digits of which everybody has some more than others."""

import torch
from torch import Tensor, nn

import fedsim
from fedsim.strategies.fedavg import FedAvg


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.short = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.short(x))


class ResNet(nn.Module):
    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(input_shape[0], width, 2), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 8,
            "partition": {"name": "dirichlet", "alpha": 1.0},
            "clients": {"count": 8},
            "strategy": {"cohort_size": 4},
            "local": {"epochs": 2, "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
            "evaluate": {"every": 8},
        },
        model=ResNet,
        strategy=FedAvg,
    )
