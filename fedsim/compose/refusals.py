"""Which parts do not go together, and why. docs/composition.md is the matrix that follows from this page.

Every check names the key to change. Parts refuse bad values of their own fields themselves; here stands what can only
be seen with two of them in hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.clients.local_training import LocalTraining
from fedsim.compress import bind
from fedsim.config import Reader
from fedsim.data.federated import FederatedData
from fedsim.engine.losses import LOSSES
from fedsim.optim import Optimizer
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.params import Layout
from fedsim.sim.links import Uplink
from fedsim.strategies.server import Aggregating
from fedsim.strategy import Strategy, Traits, parts
from fedsim.task import Task
from fedsim.tasks.bilinear import BilinearTask

NO_STRATEGY = "{0} is no strategy; write `class {0}(fedsim.Strategy)` with methods init and round, see docs/tutorial.md"
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


def check_keys(reader: Reader, target: Any, keys: Iterable[str]) -> Traits:
    """The traits of a strategy, after refusing what is none and keys of the section that it says it can't have.

    Args:
        reader: the file.
        target: the class, or a function that makes the strategy and is looked at later.
        keys: of the section.
    """
    if not isinstance(target, type):
        return Traits()
    if not issubclass(target, Strategy):
        raise reader.error("strategy.name", NO_STRATEGY.format(target.__name__))
    for key in keys:
        if key in target.traits.refused:
            raise reader.error(f"strategy.{key}", f"does not go with this strategy: {target.traits.refused[key]}")
    return target.traits


def check_strategy(reader: Reader, strategy: object, num_examples: Tensor) -> Strategy:
    """Refuse what is no strategy, a cohort larger than the federation, and a rule that can't take its replies."""
    if not isinstance(strategy, Strategy):
        raise reader.error("strategy.name", NO_STRATEGY.format(type(strategy).__name__))
    num_clients = len(num_examples)
    if (size := strategy.at_work(num_clients)) > num_clients:
        raise reader.error(
            "strategy.cohort_size", f"{size} exceeds the {num_clients} clients; lower it or raise clients.count"
        )
    if isinstance(strategy, Aggregating):
        _check_aggregation(reader, strategy, strategy.replies(num_clients))
    return strategy


def _check_aggregation(reader: Reader, strategy: Aggregating, n: int) -> None:
    """Refuse rules that can't take n replies, by trying them."""
    if n > MAX_TRIED:
        return
    replies = f"{n} replies at a time" if n > 1 else "one reply at a time"
    v, weights, rng = torch.arange(n, dtype=torch.float32)[:, None], torch.ones(n), np.random.default_rng(0)
    for i, prepare in enumerate(strategy.pre_aggregators or ()):
        try:
            v, weights = prepare(v, weights, rng)
        except ValueError as e:
            raise reader.error(f"strategy.pre_aggregators[{i}]", f"does not fit {replies}: {e}") from e
    try:
        strategy.aggregator(v, weights)
    except ValueError as e:
        left = "" if len(v) == n else f", of which pre_aggregators leave {len(v)} rows"
        raise reader.error("strategy.aggregator", f"does not fit {replies}{left}: {e}") from e


def check_local(reader: Reader, strategy: Strategy, task: Task) -> None:
    """Refuse a section that nothing would read, a rule that does not go with the strategy, and local steps on a task
    where they cannot work."""
    local_steps = parts(strategy, LocalTraining)
    name = reader.resolved["strategy"]["name"]
    for local in local_steps.values():
        try:
            local.check(strategy.traits)
        except ValueError as e:
            raise reader.error("strategy", str(e)) from e
    if not local_steps and reader.raw.get("local"):
        raise reader.error("local", f"{name} takes no local steps, so nothing would read this section; leave it out")
    if not strategy.traits.bears_buffers and task.layout.num_buffers:
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


def check_link(reader: Reader, key: str, traits: Traits, own: list[str]) -> None:
    """Refuse to compress a link for a strategy that does not bear it, or compresses with fields `own` of its own."""
    if traits.no_links is not None:
        raise reader.error(f"{key}.compressor", f"does not go with this strategy: {traits.no_links}")
    if own:
        raise reader.error(f"{key}.compressor", f"this strategy compresses by itself; set strategy.{own[0]} instead")


def check_state_scope(reader: Reader, strategy: Strategy, uplink: Uplink | None) -> None:
    """Refuse to send states where a compressor made for the model would meet them."""
    sent = any(local.optimizer.state_scope == "server" for local in parts(strategy, LocalTraining).values())
    if sent and uplink is not None:
        raise reader.error(
            "local.optimizer.state_scope",
            "server sends states that uplink.compressor does not fit; take round or client",
        )


def check_server_optimizer(optimizer: Optimizer | ForeignOptimizer) -> None:
    """A server has a gradient and nothing else to offer, and keeps its state as long as it runs."""
    if isinstance(optimizer, ForeignOptimizer):
        raise ValueError("import paths are for local optimizers; the server takes a rule of `fedsim list optimizers`")
    optimizer.check_needs({"grad"})
    if optimizer.state_scope != "round":
        raise ValueError("state_scope is for local optimizers, the server always keeps its state; leave it out")
