"""Generative adversarial networks: a generator and a discriminator, two players of one game with two losses.

    F(z) = (gradient of L_G by the generator's weights, gradient of L_D by the discriminator's), z = (both)

Goodfellow et al., arXiv:1406.2661, with its non-saturating loss for the generator; Arjovsky, Chintala, Bottou,
arXiv:1701.07875, whose discriminator is kept in a box. As an operator: Gidel, Berard, Vignoud, Vincent, Lacoste-Julien,
arXiv:1802.10551; FedAvg on it, local steps of both players, is FedGAN (Rasouli, Sun, Rajagopal, arXiv:2006.07228).

Each step draws its noise anew, one vector for each of the client's samples. Samples of the data set have noise of their
own, by which models are evaluated.

Letters: C clients of a stack, B samples of a batch, L numbers of noise, d of a sample, n samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from fedsim.data.federated import FederatedData
from fedsim.engine.base import Batch
from fedsim.engine.functional import outputs_of
from fedsim.streams import Streams, normal_of
from fedsim.task import Poison, Pool
from fedsim.tasks.pictures import grid
from fedsim.tasks.supervised import SupervisedTask, pieces
from fedsim.trees import Tree, one

SHOWN, COLUMNS = 40, 10  # samples in a picture


class Players(nn.Module):
    """Both players, called on samples and noise.

    Args:
        generator: noise [B, L] -> [B, ...] of as many numbers as a sample has.
        discriminator: samples [B, ...] -> [B, 1], large for those of the data.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator

    def forward(self, real: Tensor, noise: Tensor) -> Tensor:
        """[B, 3]: what the discriminator says of samples and of made ones, and again of these for the generator.

        The second depends on the discriminator's weights alone, the third on the generator's: the gradient of the sum
        of both losses is each player's own.
        """
        made = self.generator(noise).reshape(real.shape)
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        said = self.discriminator(real), self.discriminator(made.detach())
        return torch.cat([*said, functional_call(self.discriminator, still, (made,))], 1)


class Within(nn.Module):
    """Numbers between two bounds, by a sigmoid."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, inputs: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(inputs)


def players(
    generator: Callable[..., nn.Module],
    discriminator: Callable[..., nn.Module],
    *,
    input_shape: tuple[int, ...],
    latent: int,
    between: tuple[float, float],
) -> Players:
    """Both players, made by factories of models.

    Args:
        generator, discriminator: called with `input_shape` and `num_classes`.
        input_shape: of a sample.
        latent: L.
        between: what the numbers of samples are.
    """
    made = generator(input_shape=(latent,), num_classes=prod(input_shape))
    return Players(nn.Sequential(made, Within(*between)), discriminator(input_shape=input_shape, num_classes=1))


@dataclass(frozen=True)
class GanLoss:
    """Both players' losses of each sample, from outputs [B, 3] of `Players`.

    Args:
        of_discriminator: of what it says of samples and of made ones.
        of_generator: of what the discriminator says of made ones.
    """

    of_discriminator: Callable[[Tensor, Tensor], Tensor]
    of_generator: Callable[[Tensor], Tensor]

    def __call__(self, outputs: Tensor, targets: Tree) -> Tensor:
        """[B]: their sum."""
        return self.discriminator(outputs, targets) + self.generator(outputs, targets)

    def discriminator(self, outputs: Tensor, targets: Tree) -> Tensor:
        return self.of_discriminator(outputs[..., 0], outputs[..., 1])

    def generator(self, outputs: Tensor, targets: Tree) -> Tensor:
        return self.of_generator(outputs[..., 2])


def _told_apart(real: Tensor, made: Tensor) -> Tensor:
    return softplus(-real) + softplus(made)


def _taken_for_real(made: Tensor) -> Tensor:
    return softplus(-made)


def _difference(real: Tensor, made: Tensor) -> Tensor:
    return made - real


LOSSES = {
    "non_saturating": GanLoss(_told_apart, _taken_for_real),
    "wasserstein": GanLoss(_difference, torch.neg),
}


def with_noise(data: FederatedData, size: int, seed: int) -> FederatedData:
    """The data with noise [n, L] beside its samples, as inputs of `Players`; keyed by seed and row."""

    def beside(samples: Tree, purpose: str) -> Tree:
        assert isinstance(samples, Tensor)
        rows = torch.arange(len(samples))
        noise = Streams(seed, rows, torch.zeros_like(rows)).normal(f"latent/{purpose}", size)
        return {"real": samples, "noise": noise.to(samples)}

    return replace(data, inputs=beside(data.inputs, "train"), test_inputs=beside(data.test_inputs, "test"))


class GanTask(SupervisedTask):
    """See the module's head. The module is `Players`, data are of `with_noise`; arguments as for `SupervisedTask`."""

    def redrawn(self, batch: Batch) -> Batch:
        assert isinstance(batch.inputs, dict) and batch.streams is not None
        old = batch.inputs["noise"]
        keys = batch.streams.bits("latent", old.shape[1], batch.step)  # a sample's own, however far batches are padded
        noise = normal_of(keys.flatten(), old.shape[2], old.dtype).view(old.shape)
        return replace(batch, inputs={**batch.inputs, "noise": noise})

    def poison(self, ids: Tensor, attack: Poison) -> None:
        raise ValueError("poisons labels, which a GAN does not look at; choose another attack")

    def lacks(self, need: str) -> str | None:
        return "two players have no loss in common"

    def evaluate(self, x: Tensor, pool: Pool) -> dict[str, float]:
        """Both players' losses on held-out samples, and how far as many made ones are from these."""
        out, test = super().evaluate(x, pool), self.data.test_inputs
        assert isinstance(test, dict)
        if len(test["real"]) < 2:
            return out
        made = pool.map(self._imitation, pieces(0, len(test["noise"])), x=x)
        return out | {"test_frechet_distance": frechet_distance(torch.cat(made), test["real"])}

    def _imitation(self, span: slice, x: Tensor) -> Tensor:
        """What the generator makes of a piece of the held-out noise."""
        assert isinstance(self.data.test_inputs, dict)
        return self.made(x, self.data.test_inputs["noise"], span)

    def made(self, x: Tensor, noise: Tensor, span: slice) -> Tensor:
        """[n, ...]: samples that the generator in x [P] makes of some noise [n, L] of a pool."""
        module, (trained, buffers) = self._program.modules.get(training=False), self._program.tensors.of(x)
        assert isinstance(module, Players) and isinstance(self.data.inputs, dict)
        named = (trained | buffers).items()
        own = {name.removeprefix("generator."): t for name, t in named if name.startswith("generator.")}
        with torch.no_grad():
            return outputs_of(module.generator, own, self.read(noise, span)).reshape(
                -1, *self.data.inputs["real"].shape[1:]
            )

    def pictures(self, x: Tensor) -> dict[str, Tensor]:
        """Samples of the generator, and of the data."""
        inputs = self.data.test_inputs if len(one(self.data.test_inputs)) else self.data.inputs
        assert isinstance(inputs, dict)
        real = inputs["real"][:SHOWN].cpu()
        low, high = float(real.min()), float(real.max())
        made = self.made(x, inputs["noise"], slice(SHOWN)).cpu()
        shown = grid("Samples of the generator", made, COLUMNS, low, high)
        return shown | grid("Samples of the data", real, COLUMNS, low, high)


def frechet_distance(samples: Tensor, others: Tensor) -> float:
    """|m - m'|^2 + Tr(S + S' - 2 (S S')^(1/2)) of the means and covariances of samples [n, ...] and others [n', ...].

    The squared 2-Wasserstein distance of Gaussians with these (Dowson, Landau. 1982). The Frechet inception distance
    (Heusel et al., arXiv:1706.08500) is this of a network's features; here it is of the numbers themselves.

    >>> square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(frechet_distance(square, 2 * square + 3), 4)  # |3, 3|^2 + 2 (2 - 1)^2 4/3
    20.6667
    """
    a, b = (t.flatten(1).double().cpu() for t in (samples, others))
    d = prod(samples.shape[1:])
    s, t = (x.T.cov().view(d, d) for x in (a, b))
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * cross)
