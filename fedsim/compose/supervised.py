"""The supervised task: any data set, any torch module, any loss per sample and any metrics; and its presets.

A preset fills in loss and metrics and says what targets are; whatever it fills in may be set.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from fedsim.compose.sections import Clients
from fedsim.compose.trial import check_model
from fedsim.config import ConfigError, FromTable, at
from fedsim.data.build import build
from fedsim.data.federated import FederatedData, given_out, held_out
from fedsim.data.partition import Natural, Partition
from fedsim.data.targets import Kind, as_kind
from fedsim.engine.functional import Tensors, outputs_of
from fedsim.engine.losses import Loss, cross_entropy, masked_cross_entropy
from fedsim.params import Layout
from fedsim.prox import FREE, Prox
from fedsim.tasks.adapted import Lora, adapted, check_frozen
from fedsim.tasks.metrics import Metric
from fedsim.tasks.models import init_parameters
from fedsim.tasks.supervised import SupervisedTask
from fedsim.trees import IGNORED, pick, tensors

NUM_CLIENTS = 100  # unless the file or the data say how many there are


@dataclass(frozen=True)
class Samples:
    """A task once the engine is known.

    Args:
        data: of every client.
        held: what clients hold out of theirs; None if nothing.
        module: to train.
        x0: [P], its start.
        loss: per sample.
        metrics: by name.
        sizes: what the model was made for.
        prox: of the task.
        task: its class, called as `SupervisedTask` is.
    """

    data: FederatedData
    held: FederatedData | None
    module: nn.Module
    x0: Tensor
    loss: Loss
    metrics: dict[str, Metric]
    sizes: Mapping[str, Any]
    prox: Prox = FREE
    task: Callable[..., SupervisedTask] = SupervisedTask

    @property
    def layout(self) -> Layout:
        return Layout.of_module(self.module)

    @property
    def num_examples(self) -> Tensor:
        return self.data.num_examples


@dataclass(frozen=True, kw_only=True)
class OnSamples(ABC):
    """A task on samples that clients have.

    Args:
        dataset: the data.
    """

    targets: ClassVar[Kind] = "any"

    seed: int
    clients: Clients
    partition: Partition
    client_test: float = 0.0
    dataset: Annotated[Any, FromTable("dataset", "digits")]

    @abstractmethod
    def samples(self) -> Samples:
        """Data and module of the file, checked and tried together."""

    def data(self) -> tuple[FederatedData, FederatedData | None]:
        """(what clients train on, what they hold out)."""
        with at("task.dataset"):
            data = as_kind(self.dataset, self.targets)
        natural = isinstance(data, FederatedData) or isinstance(self.partition, Natural)
        with at("partition"):
            made = build(
                data, self.partition, self.clients.count if natural else self.clients.count or NUM_CLIENTS, self.seed
            )
        if not natural and (n := made.num_clients) > (samples := len(made)):
            warnings.warn(
                f"clients.count: {n:,} clients on {samples:,} samples, so at least {n - samples:,} of them have none "
                "and take no step; lower it",
                stacklevel=2,
            )
        if made.test_owners is None:
            return held_out(made, self.client_test, self.seed) if self.client_test else (made, None)
        if self.client_test:
            raise ConfigError("data.client_test: the data says already what each client holds out; leave it out")
        return made, given_out(made)


@dataclass(frozen=True, kw_only=True)
class Supervised(OnSamples):
    """Samples with targets of any kind: any data set, any torch module, your loss and metrics.

    Args:
        model: the module; it may ask for `input_shape` (of one sample) and `num_classes`, how wide its output is:
            classes, labels, or numbers of a target.
        loss: per sample.
        metrics: a list, beside the loss.
        train: names of the parameters that train, such as `classifier.*`; without it and `lora` the module says.
        lora: adapters that train beside linear layers, and beside what `train` names.
    """

    model: Annotated[Any, FromTable("model", "mlp")]
    loss: Annotated[Any, FromTable("loss")]
    metrics: Annotated[Any, FromTable("metrics", ())]
    train: tuple[str, ...] = ()
    lora: Lora | None = None

    def samples(self) -> Samples:
        data, held = self.data()
        sizes = self.sizes(data)
        with at("task"):
            module, x0 = init_parameters(lambda: self.module(sizes), self.seed)
        loss = self.loss if self.loss is not masked_cross_entropy or _ignores(data) else cross_entropy
        metrics = check_model(module, data, loss, dict(self.metrics))
        with at("task.model"):
            start = Tensors(module, Layout.of_module(module)).of(x0.clone())
            check_frozen(module, lambda m: outputs_of(m, start[0] | start[1], pick(data.inputs, slice(2))))
        return Samples(data, held, module, x0, loss, metrics, sizes)

    def sizes(self, data: FederatedData) -> dict[str, Any]:
        """What the model is made for, by the names of its factory's parameters."""
        shape: Any = {k: tuple(t.shape[1:]) for k, t in tensors(data.inputs).items()}
        return {"input_shape": shape.get("", shape), "num_classes": data.num_classes}

    def module(self, sizes: Mapping[str, Any]) -> nn.Module:
        """The module for data of these sizes; called with the generator of random numbers keyed."""
        return adapted(self.model(**sizes), self.train, self.lora)


@dataclass(frozen=True, kw_only=True)
class Classification(Supervised):
    """Classes (or a class at every position of a sequence): any data set, any torch module."""

    targets: ClassVar[Kind] = "classes"
    loss: Annotated[Any, FromTable("loss", "cross_entropy")]
    metrics: Annotated[Any, FromTable("metrics", ("accuracy",))]


@dataclass(frozen=True, kw_only=True)
class Regression(Supervised):
    """Numbers: one or several for each sample, by the squared error."""

    targets: ClassVar[Kind] = "numbers"
    loss: Annotated[Any, FromTable("loss", "mse")]
    metrics: Annotated[Any, FromTable("metrics", ("mae", "rmse", "r2"))]


@dataclass(frozen=True, kw_only=True)
class Multilabel(Supervised):
    """Labels that are there or not: targets [n, L] of 1 and 0, a logit for each label."""

    targets: ClassVar[Kind] = "labels"
    loss: Annotated[Any, FromTable("loss", "binary_cross_entropy")]
    metrics: Annotated[Any, FromTable("metrics", ("label_accuracy", "exact_match", "f1"))]


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Supervised):
    """The next token at every position, those with target -100 (padding) left out; perplexity."""

    targets: ClassVar[Kind] = "tokens"
    loss: Annotated[Any, FromTable("loss", "masked_cross_entropy")]
    metrics: Annotated[Any, FromTable("metrics", ("token_accuracy", "perplexity"))]


def _ignores(data: FederatedData) -> bool:
    """Whether some target, held out or not, doesn't count; where all do, the loss of classes is the same, quicker."""
    return any(bool((y == IGNORED).any()) for part in (data.targets, data.test_targets) for y in tensors(part).values())
