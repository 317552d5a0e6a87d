"""Which parts do not go together, and why. docs/composition.md is the matrix that follows from this page.

Every check names the key to change. Parts refuse bad values of their own fields themselves; here stands what can only
be seen with two of them in hand.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.compress import bind
from fedsim.config import Reader
from fedsim.data.federated import FederatedData
from fedsim.engine.losses import LOSSES
from fedsim.optim import Optimizer
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.params import Layout
from fedsim.sim.links import Uplink
from fedsim.task import Task
from fedsim.tasks.bilinear import BilinearTask

MAX_TRIED = 1000  # clients of a cohort up to which its aggregation rule is tried before the run starts


def check_model(reader: Reader, module: nn.Module, data: FederatedData, loss: str) -> None:
    """Refuse a model that can't take the data or whose logits don't count its classes."""
    was_training = module.training
    try:
        with torch.no_grad():
            logits = module.eval()(data.inputs[:2])
    except Exception as e:
        shape = list(data.inputs.shape[1:])
        raise reader.error("task.model", f"can't take samples of shape {shape}: {type(e).__name__}: {e}") from e
    finally:
        module.train(was_training)
    expected = (*data.targets[:2].shape, data.num_classes)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if loss in LOSSES and found != expected:
        raise reader.error("task.model", f"gives {found} for 2 samples where {expected} is needed: a logit per class")


def check_strategy(reader: Reader, strategy: Any, num_clients: int) -> None:
    """Refuse what is no strategy, a cohort larger than the federation, and a rule that can't take such a cohort."""
    for method in ("init", "round"):
        if not callable(getattr(strategy, method, None)):
            made = type(strategy).__name__
            raise reader.error(
                "strategy.name", f"{made} has no method {method}(); docs/tutorial.md shows what it needs"
            )
    if not (is_dataclass(strategy) and "__setattr__" in vars(type(strategy))):  # a plain subclass is not frozen either
        raise reader.error(
            "strategy.name",
            f"{type(strategy).__name__} is not a frozen dataclass, and what it kept on itself would be lost on resume "
            "and by workers; write @dataclass(frozen=True) above it and keep what changes in the state",
        )
    size = getattr(strategy, "cohort_size", None)
    if size is not None and size > num_clients:
        raise reader.error(
            "strategy.cohort_size", f"{size} exceeds the {num_clients} clients; lower it or raise clients.count"
        )
    if hasattr(strategy, "cohort_size") and hasattr(strategy, "aggregator"):
        _check_aggregation(reader, strategy, size or num_clients)


def _check_aggregation(reader: Reader, strategy: Any, n: int) -> None:
    """Refuse rules that can't take n replies, by trying them."""
    if n > MAX_TRIED:
        return
    v, weights, rng = torch.arange(n, dtype=torch.float32)[:, None], torch.ones(n), np.random.default_rng(0)
    for i, prepare in enumerate(getattr(strategy, "pre_aggregators", None) or ()):
        try:
            v, weights = prepare(v, weights, rng)
        except ValueError as e:
            raise reader.error(f"strategy.pre_aggregators[{i}]", f"does not fit a cohort of {n}: {e}") from e
    try:
        strategy.aggregator(v, weights)
    except ValueError as e:
        left = "" if len(v) == n else f", of which pre_aggregators leave {len(v)} rows"
        raise reader.error("strategy.aggregator", f"does not fit a cohort of {n}{left}: {e}") from e


def check_local(reader: Reader, strategy: Any, task: Task) -> None:
    """Refuse a section that nothing would read, and local steps on a task where they cannot work."""
    local_steps = hasattr(strategy, "local")
    name = reader.resolved["strategy"]["name"]
    if not local_steps and reader.raw.get("local"):
        raise reader.error("local", f"{name} takes no local steps, so nothing would read this section; leave it out")
    if hasattr(strategy, "no_links") and task.layout.num_buffers:
        raise reader.error(
            "strategy",
            f"{name} steps on parameters only, and this model has buffers (BatchNorm or frozen parameters); "
            "use a model without, such as resnet with GroupNorm",
        )
    if local_steps and isinstance(task, BilinearTask) and not task.lam:
        raise reader.error(
            "strategy",
            "local steps along a bilinear operator spiral away from the saddle point; set task.lam above 0, or use "
            "extragradient, masha1 or masha2",
        )


def check_compressor(reader: Reader, key: str, compressor: Any, layout: Layout) -> None:
    """Refuse a compressor that does not fit the model."""
    try:
        bind(compressor, layout).bits(layout.size)
    except ValueError as e:
        raise reader.error(key, str(e)) from e


def check_link(reader: Reader, key: str, strategy: Any, own: list[str]) -> None:
    """Refuse to compress a link for a strategy that does not bear it, or compresses with fields `own` of its own."""
    if hasattr(strategy, "no_links"):
        raise reader.error(f"{key}.compressor", f"does not go with this strategy: {strategy.no_links}")
    if own:
        raise reader.error(f"{key}.compressor", f"this strategy compresses by itself; set strategy.{own[0]} instead")


def check_state_scope(reader: Reader, strategy: Any, uplink: Uplink | None) -> None:
    """Refuse to average states where a strategy does not do it, or a compressor made for the model would meet them."""
    if not hasattr(strategy, "local") or strategy.local.optimizer.state_scope != "server":
        return
    key, name = "local.optimizer.state_scope", reader.resolved["strategy"]["name"]
    if not getattr(strategy, "averages_state", False):
        raise reader.error(key, f"server is not available for strategy {name}; take round or client, or fedavg")
    if uplink is not None:
        raise reader.error(key, "server sends states that uplink.compressor does not fit; take round or client")


def check_server_optimizer(optimizer: Optimizer | ForeignOptimizer) -> None:
    """A server has a gradient and nothing else to offer, and keeps its state as long as it runs."""
    if isinstance(optimizer, ForeignOptimizer):
        raise ValueError("import paths are for local optimizers; the server takes a rule of `fedsim list optimizers`")
    optimizer.check_needs({"grad"})
    if optimizer.state_scope != "round":
        raise ValueError("state_scope is for local optimizers, the server always keeps its state; leave it out")
