"""Clients one at a time: a gradient is a formula or torch's own, and nothing is stacked.

Of the simulator only the keyed streams are used, so that both sides see the same noise, minibatches and cohorts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim.streams import Streams, server_rng


def stream(seed: int, client: int, job: int) -> Streams:
    """The stream of one job of one client."""
    return Streams(seed, torch.tensor([client]), torch.tensor([job]))


def cohort(round: int, n: int, size: int | None) -> list[int]:
    """Who takes part in a round of seed 0."""
    if size is None or size == n:
        return list(range(n))
    return sorted(server_rng(0, "server", round).choice(n, size=size, replace=False).tolist())


class Clients(Protocol):
    """n clients; a job index counts the jobs that one of them had before."""

    n: int

    def samples(self, i: int) -> int: ...

    def steps(self, i: int) -> int: ...

    def gradient(self, i: int, y: Tensor, job: int, step: int) -> Tensor: ...

    def full(self, i: int, x: Tensor) -> Tensor: ...


class Formulas:
    """f_i(x) = a_i / 2 |x - b_i|^2 (a_i a number, a diagonal or a matrix), with keyed noise on minibatch gradients."""

    def __init__(self, a: Tensor, b: Tensor, steps: int, noise: float = 0.0) -> None:
        self.a, self.b, self.n = a, b, len(b)
        self._steps, self.noise = steps, noise

    def samples(self, i: int) -> int:
        return 1

    def steps(self, i: int) -> int:
        return self._steps

    def full(self, i: int, x: Tensor) -> Tensor:
        away = x - self.b[i]
        return self.a[i] @ away if self.a[i].ndim == 2 else self.a[i] * away

    def gradient(self, i: int, y: Tensor, job: int, step: int) -> Tensor:
        noise = stream(0, i, job).normal("noise", len(y), step=step)[0] if self.noise else 0.0
        return self.full(i, y) + self.noise * noise


class Operators:
    """F_m(z) = (lam x + A_m y + a_m, lam y - A_m' x - b_m) of a bilinear saddle point."""

    def __init__(self, matrix: Tensor, a: Tensor, b: Tensor, lam: float = 0.0) -> None:
        self.matrix, self.a, self.b, self.lam, self.n = matrix, a, b, lam, len(a)

    def full(self, i: int, z: Tensor) -> Tensor:
        x, y = z[: len(z) // 2], z[len(z) // 2 :]
        return torch.cat(
            [self.lam * x + self.matrix[i] @ y + self.a[i], self.lam * y - self.matrix[i].T @ x - self.b[i]]
        )

    def gradient(self, i: int, z: Tensor, job: int, step: int) -> Tensor:
        return self.full(i, z)


class Modules:
    """A torch module trained on every client's own samples by plain autograd."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[Any],
        targets: Sequence[Tensor],
        batch_size: int | None,
        *,
        epochs: int = 1,
        steps: int | None = None,
        seed: int = 0,
        loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        self.module, self.loss = copy.deepcopy(module), loss
        self.inputs, self.targets, self.n = inputs, targets, len(inputs)
        self.batch_size, self.epochs, self.seed, self._steps = batch_size, epochs, seed, steps

    def samples(self, i: int) -> int:
        return len(self.targets[i])

    def batches_in_an_epoch(self, i: int) -> int:
        size = self.batch_size or self.samples(i)
        return -(-self.samples(i) // size) if self.samples(i) else 0

    def steps(self, i: int) -> int:
        if self._steps is not None:
            return self._steps if self.samples(i) else 0
        return self.epochs * self.batches_in_an_epoch(i)

    def full(self, i: int, x: Tensor) -> Tensor:
        return self._autograd(x, self.inputs[i], self.targets[i]) if self.samples(i) else torch.zeros_like(x)

    def gradient(self, i: int, y: Tensor, job: int, step: int) -> Tensor:
        epoch, at = divmod(step, self.batches_in_an_epoch(i))
        order = stream(self.seed, i, job).permutation("batches", torch.tensor([self.samples(i)]), step=epoch)[0]
        size = self.batch_size or self.samples(i)
        rows = order[at * size : (at + 1) * size]
        mine = self.inputs[i]
        some = {name: t[rows] for name, t in mine.items()} if isinstance(mine, dict) else mine[rows]
        return self._autograd(y, some, self.targets[i][rows])

    def _autograd(self, x: Tensor, inputs: Any, targets: Tensor) -> Tensor:
        parameters = list(self.module.parameters())
        nn.utils.vector_to_parameters(x, parameters)
        made = self.module(**inputs) if isinstance(inputs, dict) else self.module(inputs)
        loss = self.loss(made, targets)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
