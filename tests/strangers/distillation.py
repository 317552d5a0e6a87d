"""A student learns from a teacher that stays as it is, and from few labels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedsim
from fedsim.data import Dataset, from_arrays


def moons(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (600,), generator=g)
    angle = torch.pi * (torch.rand(600, generator=g) + y)
    x = torch.stack([angle.cos() + y - 0.5, angle.sin() + 0.5 * y - 0.25], 1)
    return x + 0.1 * torch.randn(600, 2, generator=g), y


def badly_labelled(seed: int = 0) -> Dataset:
    """Two of five training labels are drawn anew: the teacher knows better."""
    x, y = moons(seed)
    g = torch.Generator().manual_seed(seed + 1)
    noisy = torch.where(torch.rand(400, generator=g) < 0.4, torch.randint(2, (400,), generator=g), y[:400])
    return from_arrays(x[:400], noisy, x[400:], y[400:])


def teacher() -> nn.Module:
    """Trained here, on samples of its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    x, y = moons(7)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


class Student(nn.Module):
    """Gives its own logits and the teacher's."""

    def __init__(self, teacher: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x), self.teacher(x)], 1)


class Distillation:
    """Hinton, Vinyals, Dean: the teacher's softened answers weigh `alpha`, labels the rest."""

    def __init__(self, temperature: float = 2.0, alpha: float = 0.9) -> None:
        self.temperature, self.alpha = temperature, alpha

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        own, taught = outputs.unbind(1)
        soft, wanted = (z / self.temperature for z in (own, taught))
        away = F.kl_div(soft.log_softmax(-1), wanted.softmax(-1), reduction="none").sum(-1) * self.temperature**2
        return self.alpha * away + (1 - self.alpha) * F.cross_entropy(own, y, reduction="none")


def right(outputs: Tensor, y: Tensor) -> Tensor:
    """The share of samples that the student gets right."""
    return (outputs[:, 0].argmax(-1) == y).float()


def main() -> fedsim.History:
    return fedsim.run(
        {
            "rounds": 12,
            "task": {
                "name": "supervised",
                "loss": {"name": f"{__name__}:Distillation", "alpha": 0.95},
                "metrics": [f"{__name__}:right"],
            },
            "clients": {"count": 10},
            "local": {"epochs": 3, "batch_size": 10, "optimizer": {"name": "adam", "lr": 0.05}},
            "evaluate": {"every": 12},
        },
        model=Student(teacher()),
        data=badly_labelled,
        strategy="fedprox",
    )
