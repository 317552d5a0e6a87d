"""What a run consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedsim.evaluation import Evaluate
from fedsim.fleet import DrivenFleet
from fedsim.stop import Stop
from fedsim.strategy import Strategy
from fedsim.task import Pool, Task


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, and what is kept of it.

    Args:
        every: rounds between checkpoints; null saves only when interrupted and at the end.
        keep: how many of the newest checkpoints are kept; null keeps all.
        best: a metric of rows (test_accuracy); the model of the round in which it is best is kept too.
    """

    every: int | None = 20
    keep: int | None = 2
    best: str | None = None

    def __post_init__(self) -> None:
        for name, unit in (("every", "round"), ("keep", "checkpoint")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 {unit} or null, got {value}")


@dataclass(kw_only=True)
class Experiment:
    """Everything a run consists of, built by the composition root from an experiment file (or by hand)."""

    task: Task
    strategy: Strategy
    fleet: DrivenFleet
    pool: Pool
    rounds: int
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Evaluate = field(default_factory=Evaluate)
    stop: Stop = field(default_factory=Stop)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    allow_divergence: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
