"""Robust logistic regression: the best classifier against one perturbation of all samples, a saddle point with samples.

    min_w max_{|r| <= epsilon} f, f the mean over clients of
    f_m(w, r) = mean over j of log(1 + exp(-y_j <w, x_j + r>)) + lam / 2 |w|^2 - rho |r|^2

The stand-in for adversarial training of Beznosikov et al., arXiv:2110.03313. f is convex in w; it is concave in r
where rho >= |w|^2 / 8, and at the solution |w|^2 <= 2 log(2) / lam.

Letters: M clients, n samples of each, C clients of a stack, B samples of a batch, d features, z = (w, r), P = 2d.
"""

from __future__ import annotations

from functools import cached_property
from math import log

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from fedsim.params import Layout
from fedsim.prox import FREE, Ball, Each, solve
from fedsim.streams import Streams, server_rng
from fedsim.task import Pool, Schedule, Task
from fedsim.tasks.batches import BatchPlan, Samples


class RobustLogisticTask(Task):
    """See the module's head.

    Args:
        inputs: [M, n, d].
        labels: [M, n], 1 or -1.
        epsilon: how far the perturbation goes; None for any distance.
        rho: what its square costs.
        lam: weight of the classifier's penalty.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, epsilon: float | None, rho: float, lam: float) -> None:
        m, n, d = inputs.shape
        if labels.shape != (m, n):
            raise ValueError(f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} do not fit")
        self.inputs, self.labels, self.epsilon, self.rho, self.lam = inputs, labels, epsilon, rho, lam
        self.layout = Layout.of({"w": (d,), "r": (d,)})
        self.num_examples = torch.full((m,), n)
        self.prox = FREE if epsilon is None else Each(self.layout, {"r": Ball(radius=epsilon)})

    @classmethod
    def drawn(
        cls,
        num_clients: int,
        dim: int,
        samples: int,
        seed: int,
        *,
        epsilon: float | None,
        rho: float,
        lam: float,
        spread: float,
    ) -> RobustLogisticTask:
        """Gaussian samples around a mean of each client, N(0, spread^2), with labels of one noisy linear rule."""
        rng = server_rng(seed, "robust_logistic")
        means = spread * rng.normal(size=(num_clients, 1, dim))
        inputs = means + rng.normal(size=(num_clients, samples, dim))
        labels = np.sign(inputs @ rng.normal(size=dim) + rng.normal(size=(num_clients, samples)))
        tensors = torch.from_numpy(inputs).float(), torch.from_numpy(labels).float()
        return cls(*tensors, epsilon, rho, lam)

    def to(self, device: torch.device) -> RobustLogisticTask:
        """The same task with its samples on a device."""
        return RobustLogisticTask(self.inputs.to(device), self.labels.to(device), self.epsilon, self.rho, self.lam)

    def init(self, seed: int) -> Tensor:
        return torch.zeros(self.layout.size, device=self.inputs.device)

    def batches(self, ids: Tensor, streams: Streams, schedule: Schedule) -> BatchPlan:
        first = streams.clients[:, None] * self.inputs.shape[1]
        return BatchPlan(self.num_examples[ids], schedule, streams, locate=lambda position: first + position)

    def field(self, x: Tensor, batch: Samples) -> tuple[Tensor, Tensor]:
        inputs, labels = self.inputs.flatten(0, 1)[batch.rows].to(x), self.labels.flatten()[batch.rows].to(x)
        return self._field(x, inputs, labels, batch.shares.to(x))

    def _field(self, z: Tensor, inputs: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """(F [C, P], f [C]) of samples [C, B, d] with shares [C, B] of their client's mean."""
        w, r = z.chunk(2, dim=1)
        moved = inputs + r[:, None]
        margin = labels * torch.einsum("cbd,cd->cb", moved, w)
        slope = -shares * labels * torch.sigmoid(-margin)  # of the loss, by <w, x + r>
        down = torch.einsum("cb,cbd->cd", slope, moved) + self.lam * w
        up = slope.sum(1, keepdim=True) * w - 2 * self.rho * r
        penalty = self.lam / 2 * w.square().sum(1) - self.rho * r.square().sum(1)
        return torch.cat([down, -up], dim=1), (shares * softplus(-margin)).sum(1) + penalty

    def solution(self) -> Tensor:
        """[P] float64: (w*, r*)."""
        return self._solution

    @cached_property
    def _solution(self) -> Tensor:
        inputs, labels = self.inputs.double().flatten(0, 1)[None], self.labels.double().flatten()[None]
        shares = torch.full_like(labels, 1 / labels.numel())
        far_w = (2 * log(2) / self.lam) ** 0.5
        far_x = float(inputs.norm(dim=2).max()) + (far_w / (2 * self.rho) if self.epsilon is None else self.epsilon)
        lipschitz = self.lam + 2 * self.rho + 1 + (far_x + far_w) ** 2 / 4
        start = torch.zeros(self.layout.size, dtype=torch.float64, device=inputs.device)
        return solve(lambda z: self._field(z[None], inputs, labels, shares)[0][0], start, self.prox, 1 / lipschitz)

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        """How far it is, and the share of samples that are classified right wherever they are moved by epsilon."""
        z = x.double()
        w, r = z.chunk(2)
        margin = self.labels.double() * (self.inputs.double() @ w)
        worst = margin - (float(r.norm()) if self.epsilon is None else self.epsilon) * w.norm()
        return {
            "distance": float((z - self.solution()).norm()),
            "robust_accuracy": float((worst > 0).double().mean()),
        }
