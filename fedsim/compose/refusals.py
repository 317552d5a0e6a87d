"""Which parts do not go together, and why. docs/composition.md is the matrix that follows from this page.

Every check names the key to change. Parts refuse bad values of their own fields themselves; here stands what can only
be seen with two of them in hand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.compress import bind
from fedsim.config import ConfigError, at
from fedsim.data.federated import FederatedData
from fedsim.engine.losses import LOSSES
from fedsim.optim import Optimizer
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.optim.needs import check_needs
from fedsim.params import Layout
from fedsim.sim.links import Uplink
from fedsim.task import Task

MAX_TRIED = 1000  # clients of a cohort up to which its aggregation rule is tried before the run starts


def check_model(module: nn.Module, data: FederatedData, loss: str) -> None:
    """Refuse a model that can't take the data or whose logits don't count its classes."""
    was_training = module.training
    try:
        with torch.no_grad():
            logits = module.eval()(data.inputs[:2])
    except Exception as e:
        shape = list(data.inputs.shape[1:])
        raise ConfigError(f"task.model: can't take samples of shape {shape}: {type(e).__name__}: {e}") from e
    finally:
        module.train(was_training)
    expected = (*data.targets[:2].shape, data.num_classes)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if loss in LOSSES and found != expected:
        raise ConfigError(f"task.model: gives {found} for 2 samples where {expected} is needed: a logit per class")


def check_methods(strategy: Any) -> None:
    """Refuse what is no strategy, a class or an object of one."""
    for method in ("init", "round"):
        if not callable(getattr(strategy, method, None)):
            name = (strategy if isinstance(strategy, type) else type(strategy)).__name__
            raise ConfigError(f"strategy.name: {name} has no method {method}(); docs/tutorial.md shows what it needs")


def check_strategy(strategy: Any, num_clients: int) -> None:
    """Refuse what is no strategy, a cohort larger than the federation, and a rule that can't take such a cohort."""
    check_methods(strategy)
    size = getattr(strategy, "cohort_size", None)
    if size is not None and size > num_clients:
        raise ConfigError(
            f"strategy.cohort_size: {size} exceeds the {num_clients} clients; lower it or raise clients.count"
        )
    if hasattr(strategy, "cohort_size") and hasattr(strategy, "aggregator"):
        _check_aggregation(strategy, size or num_clients)


def _check_aggregation(strategy: Any, n: int) -> None:
    """Refuse rules that can't take n replies, by trying them."""
    if n > MAX_TRIED:
        return
    v, weights, rng = torch.arange(n, dtype=torch.float32)[:, None], torch.ones(n), np.random.default_rng(0)
    for i, prepare in enumerate(getattr(strategy, "pre_aggregators", None) or ()):
        with at(f"strategy.pre_aggregators[{i}]: does not fit a cohort of {n}"):
            v, weights = prepare(v, weights, rng)
    left = "" if len(v) == n else f", of which pre_aggregators leave {len(v)} rows"
    with at(f"strategy.aggregator: does not fit a cohort of {n}{left}"):
        strategy.aggregator(v, weights)


def check_local(name: str, strategy: Any, task: Task) -> None:
    """Refuse local steps on a task where they cannot work, and an optimizer that needs what the task does not have."""
    if hasattr(strategy, "no_links") and task.layout.num_buffers:
        raise ConfigError(
            f"strategy: {name} steps on parameters only, and this model has buffers (BatchNorm or frozen parameters); "
            "use a model without, such as resnet with GroupNorm"
        )
    if not hasattr(strategy, "local"):
        return
    if task.no_local_steps is not None:
        raise ConfigError(f"strategy: {task.no_local_steps}")
    with at("local.optimizer"):
        check_needs(strategy.local.optimizer, task)


def check_compressor(key: str, compressor: Any, layout: Layout) -> None:
    """Refuse a compressor that does not fit the model."""
    with at(key):
        bind(compressor, layout).bits(layout.size)


def check_link(key: str, strategy: Any, own: list[str]) -> None:
    """Refuse to compress a link for a strategy that does not bear it, or compresses with fields `own` of its own."""
    if hasattr(strategy, "no_links"):
        raise ConfigError(f"{key}.compressor: does not go with this strategy: {strategy.no_links}")
    if own:
        raise ConfigError(f"{key}.compressor: this strategy compresses by itself; set strategy.{own[0]} instead")


def check_state_scope(name: str, strategy: Any, uplink: Uplink | None) -> None:
    """Refuse to average states where a strategy does not do it, or a compressor made for the model would meet them."""
    if not hasattr(strategy, "local") or strategy.local.optimizer.state_scope != "server":
        return
    key = "local.optimizer.state_scope"
    if not getattr(strategy, "averages_state", False):
        raise ConfigError(f"{key}: server is not available for strategy {name}; take round or client, or fedavg")
    if uplink is not None:
        raise ConfigError(f"{key}: server sends states that uplink.compressor does not fit; take round or client")


def check_server_optimizer(optimizer: Optimizer | ForeignOptimizer, name: str) -> Optimizer:
    """A server has a gradient and nothing else to offer, and keeps its state as long as it runs."""
    if isinstance(optimizer, ForeignOptimizer):
        raise ValueError("import paths are for local optimizers; the server takes a rule of `fedsim list optimizers`")
    optimizer.check_needs({"grad"})
    if optimizer.state_scope != "round":
        raise ValueError("state_scope is for local optimizers, the server always keeps its state; leave it out")
    return optimizer
