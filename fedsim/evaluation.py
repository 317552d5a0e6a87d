"""Evaluation: of the server's model, and of the models that clients have for themselves.

Letters: N clients, P entries of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim.config import ConfigError
from fedsim.fleet import DrivenFleet
from fedsim.metrics import Metrics, small_is_good, spread, undefined
from fedsim.strategy import Strategy
from fedsim.task import Pool, Task


@dataclass(frozen=True, kw_only=True)
class Personalise:
    """What clients do with their models before these are evaluated; nothing of it enters the run.

    Args:
        epochs: of fine-tuning on their own samples, with the batches and the optimizer of the section `local`.
    """

    epochs: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must be 0 or more, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When and what to evaluate.

    Args:
        every: rounds between evaluations (the last round is always evaluated).
        per_client: also the spread over clients, on every client's own data.
        personalise: fine-tuning before clients' own models are evaluated on what they hold out (`data.client_test`).
    """

    every: int = 5
    per_client: bool = True
    personalise: Personalise = Personalise()

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 round, got {self.every}")

    def metrics(self, task: Task, strategy: Strategy, fleet: DrivenFleet, x: Tensor, pool: Pool) -> dict[str, Any]:
        """Metrics of the server's model x [P], held out and over clients' own data, and of clients' own models."""
        out: dict[str, Any] = dict(task.evaluate(x, pool))
        if task.layout.size <= 16 and "distance" in out:
            out["x"] = x.tolist()
        if self.per_client:
            scores = task.evaluate_clients(x, pool)
            for name, values in scores.items():
                has_data = torch.isfinite(values) | (task.num_examples > 0)
                counts = has_data & ~undefined(values, scores.get("loss", values))
                found = spread(values[counts], higher_is_better=not small_is_good(name))
                out |= {f"client_{name}_{k}": v for k, v in found.items()}
        if not task.holds_out:
            return out
        return out | own_metrics(self.own_scores(strategy, fleet, x), self.per_client)

    def own_scores(self, strategy: Strategy, fleet: DrivenFleet, x: Tensor) -> dict[str, Tensor]:
        """What clients' own models, and x [P], do on samples that these hold out (`Strategy.own_scores`), [N] each.

        A client that does not answer counts as one that holds out nothing.

        Raises:
            ConfigError: if nobody holds out anything.
        """
        scores = fleet.evaluate(fleet.clients, strategy.own_scores, x=x, epochs=self.personalise.epochs)
        if not scores:  # nobody is there
            return {"examples": torch.zeros(len(fleet.clients), dtype=torch.float64)}
        if not bool(scores["examples"].any()):
            raise ConfigError("data.client_test: no client has so many samples that this is one of them; raise it")
        return {**scores, "examples": scores["examples"].nan_to_num(0.0)}


def own_metrics(scores: Mapping[str, Tensor], per_client: bool) -> dict[str, float]:
    """What a row says of clients' own models.

    Args:
        scores: {"examples": [N], "personal_" or "global_" and a metric: [N]}; clients without an example, or for which
            a metric is undefined, are left out.
        per_client: whether to say how they differ, too.

    Returns:
        {metric: the mean over all examples, metric_std and metric_worst_decile: over clients}.
    """
    examples, out = scores["examples"], dict[str, float]()
    for name, values in scores.items():
        if name != "examples":
            whose = name.partition("_")[0]
            weights = examples * ~undefined(values, scores.get(f"{whose}_loss", values))
            out |= Metrics.mean_over(values, weights, name=name).values()
            found = spread(values[weights > 0], higher_is_better=not small_is_good(name)) if per_client else {}
            out |= {f"{name}_{k}": v for k, v in found.items() if k != "mean"}
    return out
