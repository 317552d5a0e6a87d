"""Every table by the name that `fedsim list` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clients.byzantine import ATTACKS
from fedsim.aggregate import AGGREGATORS
from fedsim.compose.problems import TASKS
from fedsim.compress import COMPRESSORS
from fedsim.data import DATASETS, PARTITIONS
from fedsim.engine import ENGINES
from fedsim.engine.losses import LOSSES
from fedsim.optim.table import RULES
from fedsim.sim.devices import DEVICES
from fedsim.sinks import SINKS
from fedsim.tasks.models import MODELS
from strategies import STRATEGIES

TABLES: dict[str, Mapping[str, Any]] = {
    "strategies": STRATEGIES,
    "optimizers": RULES,
    "aggregators": AGGREGATORS,
    "partitions": PARTITIONS,
    "datasets": DATASETS,
    "models": MODELS,
    "devices": DEVICES,
    "compressors": COMPRESSORS,
    "attacks": ATTACKS,
    "tasks": TASKS,
    "losses": LOSSES,
    "engines": ENGINES,
    "sinks": SINKS,
}
