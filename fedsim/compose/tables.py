"""Every table by the name that `fedsim list` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS
from fedsim.clients.byzantine import ATTACKS
from fedsim.compose.problems import TASKS
from fedsim.compress import COMPRESSORS
from fedsim.data import DATASETS, PARTITIONS
from fedsim.engine import ENGINES
from fedsim.engine.losses import LOSSES
from fedsim.optim.table import RULES
from fedsim.overrides import shipped
from fedsim.prox import PROXES
from fedsim.sim.availability import AVAILABILITY
from fedsim.sim.devices import DEVICES
from fedsim.sinks import SINKS
from fedsim.strategies import STRATEGIES
from fedsim.strategies.selection import SELECTIONS
from fedsim.tasks.metrics import METRICS
from fedsim.tasks.models import MODELS
from fedsim.topology import TOPOLOGIES

SCHEDULES = {
    "constant": "The base learning rate, after the warm-up if there is one.",
    "step": "Times `gamma` every `every` rounds (or whatever `unit` counts).",
    "multi_step": "Times `gamma` at every milestone of the list `at`.",
    "exponential": "Times `gamma` a round.",
    "cosine": "Half a cosine from 1 down to `floor` over `length` rounds.",
    "polynomial": "(1 - k / length) to the power `power`.",
    "inverse_sqrt": "Rises over `warmup` rounds, then falls as 1 / sqrt(k).",
    "warmup_stable_decay": "Rises over `warmup`, stays at 1, and falls to 0 over the last share `decay` of `length`.",
}
"""The shapes of `optimizer: {schedule: {name: ...}}`."""

EXECUTORS = {
    "in_process": "Threads of this process: the default on one device.",
    "ray": "Ray actors, on this machine or a cluster (`runtime.address`): the default on several GPUs.",
    "torchrun": "The processes of `torchrun -m fedsim run CONFIG`: the default in such a process.",
}
"""The values of `runtime.executor` beside auto."""

CONFIGS = {
    name: " ".join(takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())).replace(
        "# ", ""
    )
    for name, path in shipped().items()
}
"""The experiment files that come with fedsim (`fedsim run quickstart`), with the remark at the head of each."""

TABLES: dict[str, Mapping[str, Any]] = {
    "strategies": STRATEGIES,
    "selections": SELECTIONS,
    "topologies": TOPOLOGIES,
    "optimizers": RULES,
    "schedules": SCHEDULES,
    "aggregators": AGGREGATORS,
    "pre_aggregators": PRE_AGGREGATORS,
    "partitions": PARTITIONS,
    "datasets": DATASETS,
    "models": MODELS,
    "devices": DEVICES,
    "availability": AVAILABILITY,
    "compressors": COMPRESSORS,
    "attacks": ATTACKS,
    "tasks": TASKS,
    "proxes": PROXES,
    "losses": LOSSES,
    "metrics": {name: metric.function for name, metric in METRICS.items()},
    "engines": ENGINES,
    "executors": EXECUTORS,
    "sinks": SINKS,
    "configs": CONFIGS,
}
