"""A module, its loss and its metrics, tried on a few samples before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.config import ConfigError, first_line
from fedsim.data.federated import FederatedData
from fedsim.engine.functional import called, tensor_of
from fedsim.engine.losses import LOSSES, OF_CLASSES, Loss
from fedsim.tasks.metrics import Metric
from fedsim.trees import Tree, each, tensors

SIZES = (3, 2)  # numbers of samples tried: what has as many entries as samples both times has one for each


def check_model(module: nn.Module, data: FederatedData, loss: Loss, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Refuse a model that can't take the data, and a loss or a metric that can't judge what it gives.

    Returns:
        The metrics, of which it is known now whether they give one number for all samples.

    Raises:
        ConfigError: naming the key, what came and what is needed.
    """
    outputs = _outputs(module, data, SIZES[0])
    _check_outputs(outputs, data, loss)
    _check_loss(loss, outputs, _first(data.targets, SIZES[0]))
    return {name: _tried(name, metric, outputs, data.targets) for name, metric in metrics.items()}


def _first(tree: Tree, n: int) -> Tree:
    return each(lambda t: t[:n], tree)


def _outputs(module: nn.Module, data: FederatedData, n: int) -> Tensor:
    """[n, ...] of the first samples, in evaluation mode."""
    was_training, inputs = module.training, each(Tensor.clone, _first(data.inputs, n))
    try:
        with torch.no_grad():
            made = called(module.eval(), {}, inputs)
    except Exception as e:
        shapes = {name: list(t.shape[1:]) for name, t in tensors(inputs).items()}
        raise ConfigError(
            f"task.model: can't take samples of shape {shapes.get('', shapes)}: {type(e).__name__}: {e}"
        ) from e
    finally:
        module.train(was_training)
    try:
        return tensor_of(made)
    except ValueError as e:
        raise ConfigError(f"task.model: {e}") from e


def _check_outputs(outputs: Tensor, data: FederatedData, loss: Loss) -> None:
    """Refuse outputs that a loss of the table does not fit."""
    name = next((name for name, row in LOSSES.items() if row is loss), None)
    targets, n = data.targets, len(outputs)
    if name is None:
        return
    if not isinstance(targets, Tensor) or (name in OF_CLASSES) == targets.is_floating_point():
        wanted = "classes" if name in OF_CLASSES else "numbers"
        found = "a dictionary" if not isinstance(targets, Tensor) else str(targets.dtype).removeprefix("torch.")
        raise ConfigError(f"task.loss: {name} takes {wanted}, but the targets are {found}; see `fedsim list losses`")
    shape = (n, *targets.shape[1:])
    wanted_shapes = [(*shape, data.num_classes)] if name in OF_CLASSES else [shape, (*shape, 1)]
    if tuple(outputs.shape) not in wanted_shapes:
        why = "a logit per class" if name in OF_CLASSES else "a number for each number of the target"
        raise ConfigError(
            f"task.model: gives {tuple(outputs.shape)} for {n} samples where {wanted_shapes[0]} is needed: {why}"
        )


def _check_loss(loss: Loss, outputs: Tensor, targets: Tree) -> None:
    try:
        found: Any = loss(outputs, targets)
    except Exception as e:
        raise ConfigError(f"task.loss: can't take the model's outputs {list(outputs.shape)}: {first_line(e)}") from e
    n = len(outputs)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != (n,):
        what = f"a tensor {list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"task.loss: gives {what} for {n} samples, where one number for each is needed, since clients' samples are "
            'weighed one by one; take reduction="none", or the mean over everything but the first axis'
        )


def _tried(name: str, metric: Metric, outputs: Tensor, targets: Tree) -> Metric:
    """The metric, which is one number for all samples if it gives that."""
    key = f"task.metrics: {name}"
    kinds = set()
    for n in {min(size, len(outputs)) for size in SIZES}:
        try:
            found = metric(outputs[:n], _first(targets, n))
        except Exception as e:
            raise ConfigError(f"{key} can't take the model's outputs {list(outputs.shape)}: {first_line(e)}") from e
        kinds.add(_kind(found, n))
    if len(kinds) != 1 or None in kinds:
        shown = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(
            f"{key} gives {shown} for {n} samples; it must give a number for each sample, a pair (totals, counts) of "
            "these, or one number for all of them"
        )
    return replace(metric, whole=kinds == {"whole"})


def _kind(found: Any, n: int) -> str | None:
    """What a metric gave for n samples; None for what it may not."""
    if isinstance(found, int | float) or (isinstance(found, Tensor) and found.ndim == 0):
        return "whole"
    if isinstance(found, tuple) and len(found) == 2 and all(isinstance(f, Tensor) and f.shape == (n,) for f in found):
        return "ratio"
    return "samples" if isinstance(found, Tensor) and found.shape[:1] == (n,) else None
