"""Metrics of held-out samples, by name.

A metric takes outputs [B, ...] and targets [B, ...] and gives one of three things:

- a value per sample [B] (or [B, ...]: the mean over the rest is taken). What is reported is the mean over samples.
- a pair ([B] totals, [B] counts). What is reported is the sum of totals over the sum of counts: the mean over positions
  that count, or a ratio such as the F1 score.
- one number for all samples that it is given, such as torchmetrics' functional forms. Such numbers can't be averaged
  (the R2 of all samples is not the mean of R2s of some), so it is called once, with all held-out samples of the server,
  and there is no such metric by client.

Whether less is better follows from the name (`fedsim.metrics.small_is_good`): that of an error ends in `error`.

Letters: B samples, K classes, T positions of a sequence, L labels, M metrics, n samples in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.engine.losses import as_targets, mae, mse, per_sample, token_losses
from fedsim.trees import IGNORED


@dataclass(frozen=True)
class Metric:
    """How good outputs are.

    Args:
        function: see the module's head.
        whole: it gives one number for all samples that it is given.
        after: what becomes of the mean, such as the root.
    """

    function: Callable[[Tensor, Any], Any]
    whole: bool = False
    after: Callable[[Tensor], Tensor] | None = None

    def __call__(self, outputs: Tensor, targets: Any) -> Any:
        return self.function(outputs, targets)

    def parts(self, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """([B] totals, [B] counts) in float64, for one that is no whole."""
        found = self.function(outputs, targets)
        if isinstance(found, tuple):
            return found[0].double(), found[1].double()
        values = per_sample(found.double())
        return values, torch.ones_like(values)

    def value(self, total: Tensor, count: Tensor) -> Tensor:
        """What is reported of sums of parts, [] or [N]; NaN where nothing counts."""
        mean = total / count
        return mean if self.after is None else self.after(mean)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of samples (of a sequence, of positions) whose largest logit is the class."""
    if targets.is_floating_point():  # numbers would be equal to an index by chance only, and broadcast
        raise ValueError("the targets are numbers, not classes")
    return outputs.argmax(-1) == targets


def token_accuracy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Share of positions whose largest logit is the next token, over those whose target is not -100."""
    counts = targets != IGNORED
    return (accuracy(outputs, targets) & counts).flatten(1).sum(1), counts.flatten(1).sum(1)


def perplexity(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Exponential of the mean cross-entropy over all positions whose target is not -100 (parts of the mean)."""
    return token_losses(outputs, targets)


def rmse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Root of the mean squared error of numbers (parts of the mean)."""
    return mse(outputs, targets)


def label_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of labels that are rightly there or not; a logit above 0 says there."""
    return (as_targets(outputs, targets) > 0) == (targets > 0.5)


def exact_match(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of samples all of whose labels are right."""
    return label_accuracy(outputs, targets).flatten(1).all(1)


def f1(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """F1 score over all labels of all samples (micro): twice the hits over the labels found and the labels there."""
    found, there = as_targets(outputs, targets) > 0, targets > 0.5
    return 2 * (found & there).flatten(1).sum(1), (found.int() + there.int()).flatten(1).sum(1)


def r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the targets' variance that the outputs explain, the mean over numbers that vary; 1 is perfect."""
    y, away = targets.double(), as_targets(outputs, targets).double() - targets
    total = (y - y.mean(0)).square().sum(0)
    return (1 - away.square().sum(0) / total)[total > 0].mean()


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy),
    "token_accuracy": Metric(token_accuracy),
    "perplexity": Metric(perplexity, after=torch.exp),
    "mae": Metric(mae),
    "mse": Metric(mse),
    "rmse": Metric(rmse, after=torch.sqrt),
    "r2": Metric(r2, whole=True),
    "label_accuracy": Metric(label_accuracy),
    "exact_match": Metric(exact_match),
    "f1": Metric(f1),
}
