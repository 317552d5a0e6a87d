"""Games on samples: tasks whose variable has two sides, one of which goes up what the other goes down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fedsim.compose.supervised import Classification, OnSamples, Samples
from fedsim.compose.trial import check_model
from fedsim.config import ConfigError, FromTable, at, first_line
from fedsim.data.federated import FederatedData
from fedsim.params import Layout
from fedsim.prox import FREE, Ball, Box, Each, Prox, Rows
from fedsim.tasks.adversarial import NAME, AdversarialTask, Perturbed, with_labels
from fedsim.tasks.gan import LOSSES, GanTask, Players, players, with_noise
from fedsim.tasks.metrics import Metric
from fedsim.tasks.models import init_parameters


@dataclass(frozen=True, kw_only=True)
class Adversarial(Classification):
    """Classes, each with a perturbation of its samples that goes up the loss: any data of numbers, any torch module.

    Args:
        epsilon: how far a class' perturbation goes; null for any distance.
        norm: by which it is measured: l2, or linf, the largest change of a number.
        rho: what the sum of squares of all perturbations costs.
    """

    epsilon: float | None = 1.0
    norm: Literal["l2", "linf"] = "l2"
    rho: float = 0.0

    def __post_init__(self) -> None:
        if not (self.epsilon is None or 0 < self.epsilon < inf) or not 0 <= self.rho < inf:
            raise ValueError(f"needs epsilon > 0 or null and rho >= 0, got {self.epsilon} and {self.rho}")
        if self.epsilon is None and not self.rho:
            raise ValueError("nothing bounds the perturbation; set task.epsilon, or task.rho above 0")

    def module(self, sizes: Mapping[str, Any]) -> nn.Module:
        return Perturbed(super().module(sizes), **sizes)

    def data(self) -> tuple[FederatedData, FederatedData | None]:
        data, held = super().data()
        with at("task.dataset"):
            return with_labels(data), None if held is None else with_labels(held)

    def sizes(self, data: FederatedData) -> dict[str, Any]:
        found = super().sizes(data)
        return {**found, "input_shape": found["input_shape"]["inputs"]}

    def samples(self) -> Samples:
        found = super().samples()
        task = partial(AdversarialTask, rho=self.rho)
        return replace(found, prox=self._prox(found), task=task)

    def _prox(self, found: Samples) -> Prox:
        if self.epsilon is None:
            return FREE
        of = Ball(radius=self.epsilon) if self.norm == "l2" else Box(low=-self.epsilon, high=self.epsilon)
        return Each(found.layout, {NAME: Rows(of, found.sizes["num_classes"])})


@dataclass(frozen=True, kw_only=True)
class Gan(OnSamples):
    """A generator and a discriminator of samples: any data of numbers, any two torch modules.

    Args:
        generator: noise to a sample; it is asked for with `input_shape` [latent] and `num_classes`, the numbers of a
            sample, and what it gives goes through a sigmoid to the range of the data.
        discriminator: a sample to one number (`num_classes` 1).
        latent: numbers of noise for a sample.
        loss: non_saturating, or wasserstein, which needs a `prox`.
        prox: of each of the discriminator's tensors: a set to stay in, or a penalty. A box is the clipping of WGAN.
    """

    generator: Annotated[Any, FromTable("model", {"name": "mlp", "hidden": [64]})]
    discriminator: Annotated[Any, FromTable("model", {"name": "mlp", "hidden": [64]})]
    latent: int = 16
    loss: Literal["non_saturating", "wasserstein"] = "non_saturating"
    prox: Annotated[Prox | None, FromTable("prox")] = None

    def __post_init__(self) -> None:
        if self.latent < 1:
            raise ValueError(f"latent must be at least 1, got {self.latent}")
        if self.loss == "wasserstein" and self.prox is None:
            raise ValueError(
                "loss wasserstein has no end where nothing holds the discriminator; set task.prox, such as "
                "{name: box, low: -0.1, high: 0.1}"
            )

    def samples(self) -> Samples:
        data, held = self.data()
        real = data.inputs
        if not isinstance(real, Tensor) or not real.is_floating_point():
            raise ConfigError("task.dataset: a GAN needs samples that are one tensor of numbers each")
        shape, between = tuple(real.shape[1:]), (float(real.min()), float(real.max()))
        sizes: dict[str, Any] = {"input_shape": shape, "latent": self.latent, "between": between}
        data = with_noise(data, self.latent, self.seed)
        held = None if held is None else with_noise(held, self.latent, self.seed)
        with at("task"):
            module, x0 = init_parameters(lambda: players(self.generator, self.discriminator, **sizes), self.seed)
        assert isinstance(module, Players)
        _check("generator", module.generator, torch.zeros(2, self.latent), 2 * prod(shape))
        _check("discriminator", module.discriminator, real[:2], 2)
        loss = LOSSES[self.loss]
        metrics = {
            "generator_loss": Metric(loss.generator),
            "discriminator_loss": Metric(loss.discriminator),
        }
        layout = Layout.of_module(module)
        names = [name for name in layout.trainable.names if name.startswith("discriminator.")]
        prox = FREE if self.prox is None else Each(layout, dict.fromkeys(names, self.prox))
        return Samples(data, held, module, x0, loss, check_model(module, data, loss, metrics), sizes, prox, GanTask)


def _check(player: str, module: nn.Module, inputs: Tensor, wanted: int) -> None:
    """Refuse a player that gives something else for two inputs than so many numbers."""
    try:
        with torch.no_grad():
            found = module.eval()(inputs)
    except Exception as e:
        raise ConfigError(f"task.{player}: can't take inputs of {list(inputs.shape[1:])}: {first_line(e)}") from e
    if not isinstance(found, Tensor) or found.numel() != wanted:
        shown = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(f"task.{player}: makes {shown} of 2 inputs, and {wanted} numbers in all are needed")
