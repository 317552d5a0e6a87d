"""Table entries inside a section, by the kinds that parameters are marked with (`fedsim.config.FromTable`).

What needs something that is not known while its section is read (a data set its folder, a model its sizes, devices
their number, an optimizer the layout) says so, and is made when it is given that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS
from fedsim.clients.byzantine import ATTACKS
from fedsim.compose.functions import loss, metrics
from fedsim.compose.problems import TASKS
from fedsim.compose.refusals import check_keys, check_server_optimizer
from fedsim.compress import COMPRESSORS
from fedsim.config import Call, ConfigError, Kinds, decode_entry, named
from fedsim.data import PARTITIONS
from fedsim.data.sources import entry as dataset
from fedsim.optim import build
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.optim.spec import is_rule
from fedsim.optim.table import RULES
from fedsim.sim.availability import AVAILABILITY
from fedsim.sim.devices import DEVICES
from fedsim.strategies import STRATEGIES
from fedsim.strategies.selection import SELECTIONS
from fedsim.tasks.models import MODELS

Table = Mapping[str, Callable[..., Any]]
Check = Callable[[Any, str], Any]


def _from(table: Table, needs: Collection[str] = (), check: Check | None = None) -> Callable[[Any, str, Kinds], Call]:
    return lambda value, key, kinds: decode_entry(table, value, key, kinds, needs=needs, check=check)


def _optimizer(check: Check | None = None) -> Callable[[Any, str, Kinds], Call]:
    """A rule, of the table or the user's own, with its settings, or any class of torch optimizers, for a layout."""

    def decode_optimizer(value: Any, key: str, kinds: Kinds) -> Call:
        target, name, rest = named(RULES, value, key)
        section, needs = {"name": name, **rest}, frozenset({"layout"})
        if name in RULES or is_rule(target):
            return Call(build, {"spec": section, "key": key}, section, key, needs, check)

        def say(made: ForeignOptimizer, name: str) -> ForeignOptimizer:
            warnings.warn(f"{key}: {name} is not batched, clients step one after the other", stacklevel=2)
            return made

        return Call(ForeignOptimizer, {"make": target, "arguments": rest}, section, key, needs, check or say)

    return decode_optimizer


def _strategy(value: Any, key: str, kinds: Kinds) -> Call:
    """Like any entry, but what it says that it can't have is refused first."""
    target, _, keys = named(STRATEGIES, value, key)
    check_keys(target, keys)
    return decode_entry(STRATEGIES, value, key, kinds, needs=("local", "layout", "count"))


def _pre_aggregators(value: Any, key: str, kinds: Kinds) -> tuple[Call, ...]:
    """A list of entries."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}: expected a list such as [nnm, {{name: clipping, norm: 1}}], got {value!r}")
    return tuple(decode_entry(PRE_AGGREGATORS, entry, f"{key}[{i}]", kinds) for i, entry in enumerate(value))


def _as_module(made: Any, name: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} gave a {type(made).__name__}, not a torch.nn.Module")
    return made


KINDS: Kinds = {
    "task": _from(TASKS, needs=("seed", "count", "clients", "device", "partition", "client_test")),
    "strategy": _strategy,
    "selection": _from(SELECTIONS),
    "partition": _from(PARTITIONS),
    "dataset": dataset,
    "loss": loss,
    "metrics": metrics,
    "model": _from(MODELS, needs=("input_shape", "num_classes"), check=_as_module),
    "optimizer": _optimizer(),
    "server_optimizer": _optimizer(check_server_optimizer),
    "device": _from(DEVICES, needs=("count",)),
    "availability": _from(AVAILABILITY, needs=("count",)),
    "aggregator": _from(AGGREGATORS),
    "pre_aggregators": _pre_aggregators,
    "attack": _from(ATTACKS),
    "compressor": _from(COMPRESSORS),
}
