"""A softmax regression that supplies every need by plain autograd, client by client."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.optim.needs import clip_and_sum
from fedsim.optim.segments import Segments
from fedsim.params import Layout

CLASSES, FEATURES = 4, 6
LAYOUT = Layout.of({"w": (CLASSES, FEATURES), "b": (CLASSES,)})


class SoftmaxSource:
    """Batches [k, B, FEATURES] with targets [k, B]; labels are drawn from a seed given at the start."""

    available = frozenset({"loss_eval", "sampled_grad", "hvp", "per_sample_norms"})

    def __init__(self, clients: int = 3, samples: int = 5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(clients, samples, FEATURES, generator=generator, dtype=torch.float64)
        self.targets = torch.randint(CLASSES, (clients, samples), generator=generator)
        self.drawn = torch.rand(clients, samples, 1, generator=generator, dtype=torch.float64)
        self.asked: list[str] = []

    def start(self) -> Tensor:
        return torch.randn(
            len(self.inputs), LAYOUT.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )

    def batch_sizes(self) -> Tensor:
        return torch.full((len(self.inputs),), self.inputs.shape[1])

    def num_labels(self) -> Tensor:
        return self.batch_sizes()

    def logits(self, x: Tensor) -> Tensor:
        views = LAYOUT.views(x)
        return self.inputs[: len(x)] @ views["w"].mT + views["b"][:, None]

    def sample_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """[k, B]."""
        return F.cross_entropy(self.logits(x).mT, targets[: len(x)], reduction="none")

    def losses(self, points: Tensor) -> Tensor:
        self.asked.append("losses")
        return torch.stack([self.sample_losses(x, self.targets).mean(1) for x in points])

    def grad(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        x = x.detach().requires_grad_()
        loss = self.sample_losses(x, self.targets if targets is None else targets).mean(1).sum()
        return torch.autograd.grad(loss, x)[0]

    def sampled_targets(self, x: Tensor) -> Tensor:
        return (self.logits(x).softmax(-1).cumsum(-1) < self.drawn[: len(x)]).sum(-1).clamp(max=CLASSES - 1)

    def sampled_grad(self, x: Tensor) -> Tensor:
        self.asked.append("sampled_grad")
        return self.grad(x, self.sampled_targets(x))

    def hvp(self, x: Tensor, v: Tensor) -> Tensor:
        self.asked.append("hvp")
        x = x.detach().requires_grad_()
        loss = self.sample_losses(x, self.targets).mean(1).sum()
        first = torch.autograd.grad(loss, x, create_graph=True)[0]
        return torch.autograd.grad((first * v).sum(), x)[0]

    def per_sample(self, x: Tensor) -> Tensor:
        """[k, B, P] gradients of each sample's own loss."""
        x = x.detach().requires_grad_()
        losses = self.sample_losses(x, self.targets)
        rows = [torch.autograd.grad(losses[:, i].sum(), x, retain_graph=True)[0] for i in range(losses.shape[1])]
        return torch.stack(rows, 1)

    def clipped_sum(self, x: Tensor, bounds: Tensor) -> Tensor:
        self.asked.append("clipped_sum")
        return clip_and_sum(self.per_sample(x), bounds, Segments.of(LAYOUT))
