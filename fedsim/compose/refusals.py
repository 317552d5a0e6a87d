"""Which parts do not go together, and why. docs/composition.md is the matrix that follows from this page.

Every check names the key to change. Parts refuse bad values of their own fields themselves; here stands what can only
be seen with two of them in hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.clients.byzantine import Silence
from fedsim.clients.local_training import LocalTraining
from fedsim.config import ConfigError, FromTable, at
from fedsim.hints import parameters
from fedsim.optim import Optimizer
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.optim.needs import check_needs
from fedsim.prox import FREE
from fedsim.sim.absence import Absence
from fedsim.sim.byzantine import Byzantine, Knowledge
from fedsim.sim.links import Uplink
from fedsim.strategies.peers import Peers
from fedsim.strategies.server import Aggregating, Selecting, Server
from fedsim.strategy import Strategy, compressors, fields_of
from fedsim.streams import Streams
from fedsim.task import Task

NO_STRATEGY = (
    "{0} is no strategy; write `class {0}(fedsim.Strategy)` with methods init and round, see docs/tutorial/algorithm.md"
)
MAX_TRIED = 1000  # clients of a cohort up to which its aggregation rule is tried before the run starts


def check_keys(target: Any, section: Mapping[str, Any]) -> None:
    """Refuse what is no strategy, and keys of the section that it says it can't have, unless they say what is anyway.

    Args:
        target: the class, or a function that makes the strategy and is looked at later.
        section: of the file.
    """
    if not isinstance(target, type):
        return
    refused = _checked(target).traits.refused
    usual = {field.name: field.default for field in fields(target)} | {
        key: mark.default if isinstance(mark.default, Mapping) else {"name": mark.default}
        for key, (hint, _) in parameters(target).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, FromTable) and mark.default is not None
    }
    for key, value in section.items():
        if key in refused and (key not in usual or value != usual[key]):
            raise ConfigError(f"strategy.{key}: does not go with this strategy: {refused[key]}")


def _checked(made: type) -> type[Strategy]:
    if not issubclass(made, Strategy):
        raise ConfigError(f"strategy.name: {NO_STRATEGY.format(made.__name__)}")
    if not (is_dataclass(made) and "__setattr__" in vars(made)):  # a plain subclass is not frozen either
        raise ConfigError(
            f"strategy.name: {made.__name__} is not a frozen dataclass, and what it kept on itself would be lost on "
            "resume and by workers; write @dataclass(frozen=True) above it and keep what changes in the state"
        )
    return made


def check_strategy(strategy: object, num_examples: Tensor) -> Strategy:
    """Refuse what is no strategy, a cohort or a selection that does not fit the federation, and such a rule."""
    _checked(type(strategy))
    assert isinstance(strategy, Strategy)
    num_clients = len(num_examples)
    if (size := strategy.at_work(num_clients)) > num_clients:
        raise ConfigError(
            f"strategy.cohort_size: {size} exceeds the {num_clients} clients; lower it or raise clients.count"
        )
    if isinstance(strategy, Selecting):
        with at("strategy.selection"):
            strategy.known_at_first(num_clients)
    if isinstance(strategy, Aggregating):
        _check_aggregation(strategy, strategy.replies(num_clients))
    return strategy


def _check_aggregation(strategy: Aggregating, n: int) -> None:
    """Refuse rules that can't take n replies, by trying them."""
    if n > MAX_TRIED:
        return
    replies = f"{n} replies at a time" if n > 1 else "one reply at a time"
    v, weights, rng = torch.arange(n, dtype=torch.float32)[:, None], torch.ones(n), np.random.default_rng(0)
    for i, prepare in enumerate(strategy.pre_aggregators or ()):
        with at(f"strategy.pre_aggregators[{i}]: does not fit {replies}"):
            v, weights = prepare(v, weights, rng)
    left = "" if len(v) == n else f", of which pre_aggregators leave {len(v)} rows"
    with at(f"strategy.aggregator: does not fit {replies}{left}"):
        strategy.aggregator(v, weights)


def check_local(name: str, strategy: Strategy, task: Task) -> None:
    """Refuse local steps on a task where they cannot work, and optimizers that strategy or task can't bear."""
    traits = strategy.traits
    if not traits.bears_buffers and task.layout.num_buffers:
        raise ConfigError(
            f"strategy: {name} steps on parameters only, and this model has buffers (BatchNorm); "
            "use a model without, such as resnet with GroupNorm"
        )
    for local in fields_of(strategy, LocalTraining).values():
        with at("strategy"):
            local.check(traits)
        if task.no_local_steps is not None:
            raise ConfigError(f"strategy: {task.no_local_steps}")
        with at("local.optimizer"):
            check_needs(local.optimizer, task)


def check_prox(name: str, strategy: Strategy, task: Task) -> None:
    """Refuse a set or a penalty that the strategy's steps would pass over."""
    if task.prox != FREE and task.prox not in fields_of(strategy, type(task.prox)).values():
        raise ConfigError(
            f"task.prox: {name} has no prox in its steps; leave it out, or take extragradient, optimistic_gradient or "
            "masha1"
        )


def check_step(strategy: Strategy, task: Task) -> None:
    """Say that a step is longer than the strategy's theory allows on this task, where both are known."""
    proven = None if task.constants is None else strategy.proven(task.constants, task.layout.size)
    if proven is not None and proven[0] > proven[1] * (1 + 1e-9):
        warnings.warn(
            f"the step {proven[0]:.3g} is above {proven[1]:.3g}, up to which the theory of this strategy has it "
            "converge on this task; it may go on converging well above, or diverge",
            stacklevel=2,
        )


def check_personalise(epochs: int, strategy: Strategy, task: Task) -> None:
    """Refuse to tune models that nobody would look at, or where clients can't train what a server sent."""
    if not epochs:
        return
    if not task.holds_out:
        raise ConfigError(
            "evaluate.personalise: own models are evaluated on samples that clients hold out; set data.client_test: 0.2"
        )
    if not isinstance(strategy, Server):
        raise ConfigError("evaluate.personalise: this strategy has no server whose model clients train; leave it out")


def check_selection(strategy: Strategy, task: Task) -> None:
    """Refuse weights that need not add up to one where a mean is needed: of buffers, and of optimizers' states."""
    if not isinstance(strategy, Selecting) or not strategy.selection.weighs:
        return
    for what, there in (
        ("buffers (BatchNorm)", task.layout.num_buffers > 0),
        ("states (local.optimizer.state_scope: server)", strategy.local.optimizer.state_scope == "server"),
    ):
        if there:
            raise ConfigError(
                f"strategy.selection: {type(strategy.selection).__name__} gives replies weights that add up to one on "
                f"average only, and {what} need a mean every time; use another selection"
            )


def check_link(key: str, strategy: Strategy, own: str) -> None:
    """Refuse to compress a link for a strategy that does not bear it, or compresses it by a field `own` of its own."""
    if (no_links := strategy.traits.no_links) is not None:
        raise ConfigError(f"{key}.compressor: does not go with this strategy: {no_links}")
    if own in compressors(strategy):
        raise ConfigError(f"{key}.compressor: this strategy compresses by itself; set strategy.{own} instead")


def check_absence(absence: Absence, strategy: Strategy, num_clients: int) -> None:
    """Refuse that clients are away or drop out where a strategy needs all of them, and that too few ever come."""
    needs_all = strategy.traits.needs_all
    if needs_all is not None and absence.kills:
        key, way = ("availability", "take always") if absence.away else ("dropout", "leave it out")
        raise ConfigError(f"clients.{key}: does not go with this strategy: {needs_all}; {way}")
    if absence.away:
        with at("clients.availability"):
            absence.wait(torch.arange(num_clients), 0.0, strategy.needed(num_clients))


def check_attack(byzantine: Byzantine, strategy: Strategy, num_clients: int) -> None:
    """Refuse silence that no step could be taken after, and an attack that is not defined for so many, by trying it."""
    b, attack = len(byzantine.ids), byzantine.attack
    if isinstance(attack, Silence) and num_clients - b < (needed := strategy.needed(num_clients)):
        raise ConfigError(
            f"clients.byzantine: {b} of {num_clients} clients are silent, and without {needed} that answer this "
            "strategy never takes a step; make fewer silent, take another attack, or a strategy that bears so many"
        )
    if hasattr(attack, "to_each") and isinstance(strategy, Peers):
        return
    replies = strategy.replies(num_clients)
    if replies > MAX_TRIED:
        return
    if replies < num_clients:  # at best one of those that reply together is byzantine
        honest, b = min(num_clients - b, max(replies - 1, 1)), 1
    else:
        honest = num_clients - b
    try_attack(byzantine, honest, b)


def try_attack(byzantine: Byzantine, honest: int, b: int) -> None:
    """Refuse an attack that is not defined for so many honest and byzantine clients."""
    streams = Streams(byzantine.seed, byzantine.ids[:b], torch.zeros(b, dtype=torch.int64))
    known = byzantine.rule is not None or byzantine.mix is not None
    rule = (lambda sent: torch.zeros(1)) if known else None
    with at("clients.byzantine.attack"):
        byzantine.attack(torch.zeros(honest, 1), b, streams, Knowledge(rule=rule, own=torch.zeros(b, 1)))


def check_seen(strategy: Strategy, task: Task) -> None:
    """Say of a task with samples that nobody will see how good the models are that clients have for themselves."""
    if strategy.traits.own_models and not task.holds_out:
        warnings.warn(
            "clients have models of their own, and nothing will say how good they are; set data.client_test: 0.2, so "
            "that each client holds out samples to evaluate its own on",
            stacklevel=2,
        )


def check_state_scope(strategy: Strategy, uplink: Uplink | None) -> None:
    """Refuse to send states where a compressor made for the model would meet them."""
    sent = any(local.optimizer.state_scope == "server" for local in fields_of(strategy, LocalTraining).values())
    if sent and uplink is not None:
        raise ConfigError(
            "local.optimizer.state_scope: server sends states that uplink.compressor does not fit; take round or client"
        )


def check_server_optimizer(optimizer: Optimizer | ForeignOptimizer, name: str) -> Optimizer:
    """A server has a gradient and nothing else to offer, and keeps its state as long as it runs."""
    if isinstance(optimizer, ForeignOptimizer):
        raise ValueError("import paths are for local optimizers; the server takes a rule of `fedsim list optimizers`")
    if needs := sorted(optimizer.needs - {"grad"}):
        raise ValueError(f"{name} needs {', '.join(needs)}, and a server has a gradient alone; choose another rule")
    if optimizer.state_scope != "round":
        raise ValueError("state_scope is for local optimizers, the server always keeps its state; leave it out")
    return optimizer
