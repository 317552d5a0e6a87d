"""Table entries inside a section, by the kinds that parameters are marked with (`fedsim.config.FromTable`).

What needs something that is not known while its section is read (a data set its folder, a model its sizes, devices
their number, an optimizer the layout) says so, and is made when it is given that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS
from fedsim.clients.byzantine import ATTACKS
from fedsim.compose.functions import loss, metrics
from fedsim.compose.problems import TASKS
from fedsim.compose.refusals import check_keys, check_server_optimizer
from fedsim.compress import COMPRESSORS
from fedsim.config import Call, ConfigError, Given, Kinds, at, decode, decode_entry, named
from fedsim.data import PARTITIONS
from fedsim.data.sources import entry as dataset
from fedsim.hints import checked
from fedsim.optim import build
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.optim.spec import is_rule
from fedsim.optim.table import RULES
from fedsim.prox import PROXES
from fedsim.sim.availability import AVAILABILITY
from fedsim.sim.devices import DEVICES
from fedsim.sinks import SINKS, as_sink
from fedsim.stop import Patience, Stop
from fedsim.strategies import STRATEGIES
from fedsim.strategies.selection import SELECTIONS
from fedsim.strategy import Strategy
from fedsim.tasks.models import MODELS, as_module
from fedsim.topology import TOPOLOGIES

GIVEN: dict[str, tuple[str, ...]] = {
    "task": ("seed", "count", "clients", "device", "partition", "client_test"),
    "strategy": ("local", "layout", "count", "prox"),
    "model": ("input_shape", "num_classes"),
    "loss": ("logits", "outputs", "targets"),
    "device": ("count",),
    "availability": ("count",),
}
"""{kind: parameters of its entries that come from elsewhere in the file, so that they are no keys of theirs}."""

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
            spec = value if isinstance(value, Mapping) else {"name": value}
            return Call(build, {"spec": spec, "key": key}, section, key, needs, check)

        def say(made: ForeignOptimizer, name: str) -> ForeignOptimizer:
            warnings.warn(f"{key}: {name} is not batched, clients step one after the other", stacklevel=2)
            return made

        return Call(ForeignOptimizer, {"make": target, "arguments": rest}, section, key, needs, check or say)

    return decode_optimizer


def shared_fields(key: str, before: str | Given, after: str | Given) -> frozenset[str] | None:
    """Fields that two entries of a section have from one definition, as strategies have those of their common bases.

    Rules of local training share none: a rate of one is no rate for another. None for other sections, whose fields are
    their entries' own, and for a name that is unknown, of which more is said when it is decoded.
    """
    if key == "local.optimizer" and {before, after} <= RULES.keys():
        return frozenset()
    if key != "strategy":
        return None
    try:
        old, new = (named(STRATEGIES, name, key)[0] for name in (before, after))
    except ConfigError:
        return None
    if not (isinstance(old, type) and isinstance(new, type) and issubclass(new, Strategy)):
        return None
    found = _definitions(new).items() & _definitions(old).items()
    return frozenset(name for name, _ in found) - new.traits.refused.keys()


def _definitions(target: type) -> dict[str, type]:
    """{field: the class that has it first; those below may change its default}."""
    return {name: each for each in target.__mro__ for name in vars(each).get("__annotations__", ())}


def _strategy(value: Any, key: str, kinds: Kinds) -> Call:
    """Like any entry, but what it says that it can't have is refused first."""
    target, _, keys = named(STRATEGIES, value, key)
    check_keys(target, keys)
    return decode_entry(STRATEGIES, value, key, kinds, needs=GIVEN["strategy"])


def _pre_aggregators(value: Any, key: str, kinds: Kinds) -> tuple[Call, ...]:
    """A list of entries."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}: expected a list such as [nnm, {{name: clipping, norm: 1}}], got {value!r}")
    return tuple(decode_entry(PRE_AGGREGATORS, entry, f"{key}[{i}]", kinds) for i, entry in enumerate(value))


def _stop(value: Any, key: str, kinds: Kinds) -> Call:
    """{metric: bound}, whatever the metric, and `patience`; null is no bound."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}: expected a section such as {{test_accuracy: 0.9}}, got {value!r}")
    bounds: dict[str, Any] = {}
    for name, bound in value.items():
        if name != "patience" and bound is not None:
            with at(f"{key}.{name}"):
                bounds[str(name)] = checked(bound, float)
    arguments: dict[str, Any] = {"bounds": bounds}
    if value.get("patience") is not None:
        arguments["patience"] = decode(Patience, value["patience"], f"{key}.patience")
    nested = {name: call.resolved for name, call in arguments.items() if isinstance(call, Call)}
    return Call(Stop, arguments, {**bounds, **nested}, key)


def _sinks(value: Any, key: str, kinds: Kinds) -> tuple[Call, ...]:
    """A list of entries; each of the table's stands there once, for it has a place of its own in the run's folder."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}: expected a list such as [tensorboard, {{name: wandb, group: a}}], got {value!r}")
    calls = tuple(decode_entry(SINKS, entry, f"{key}[{i}]", kinds, check=as_sink) for i, entry in enumerate(value))
    for i, call in enumerate(calls):
        if call.name in SINKS and call.name in [before.name for before in calls[:i]]:
            raise ConfigError(f"{key}[{i}]: {call.name} stands there twice; leave one out")
    return calls


KINDS: Kinds = {
    "stop": _stop,
    "task": _from(TASKS, needs=GIVEN["task"]),
    "strategy": _strategy,
    "selection": _from(SELECTIONS),
    "topology": _from(TOPOLOGIES),
    "partition": _from(PARTITIONS),
    "dataset": dataset,
    "loss": loss,
    "metrics": metrics,
    "model": _from(MODELS, needs=GIVEN["model"], check=as_module),
    "optimizer": _optimizer(),
    "server_optimizer": _optimizer(check_server_optimizer),
    "device": _from(DEVICES, needs=GIVEN["device"]),
    "availability": _from(AVAILABILITY, needs=GIVEN["availability"]),
    "aggregator": _from(AGGREGATORS),
    "pre_aggregators": _pre_aggregators,
    "attack": _from(ATTACKS),
    "compressor": _from(COMPRESSORS),
    "prox": _from(PROXES),
    "sinks": _sinks,
}
