"""Losses and metrics as a file names them: a row of a table, or the user's own function or class by import path.

Whatever else stands in such an entry goes to the function as keyword arguments, or to the class when it is made:
`loss: {name: huber, delta: 0.5}`, `loss: {name: "torch.nn:SmoothL1Loss", reduction: none}`,
`metrics: [mae, {name: "torchmetrics.functional:f1_score", task: multiclass, num_classes: 10, average: macro}]`. The
key `as` is the name that a metric has in rows, where that of the function will not do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, cast

from torch import Tensor

from fedsim.config import Call, ConfigError, Kinds, decode, named
from fedsim.engine.losses import LOSSES, Loss, per_sample
from fedsim.hints import parameters
from fedsim.metrics import SPREAD
from fedsim.tasks.metrics import METRICS, Metric


@dataclass(frozen=True)
class PerSample:
    """The user's own loss, whose values [B, ...] count as their mean over everything but the samples."""

    function: Callable[[Tensor, Any], Tensor]

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        return per_sample(self.function(outputs, targets))


def loss(value: Any, key: str, kinds: Kinds) -> Call:
    """A loss per sample."""
    target, name, rest = named(LOSSES, value, key)
    function, call = _function(target, rest, key)
    made: Loss = function if name in LOSSES else PerSample(function)
    return Call(lambda: made, {}, {"name": name, **call}, key)


def metrics(value: Any, key: str, kinds: Kinds) -> tuple[Call, ...]:
    """A list of entries; each call gives (name, metric)."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}: expected a list such as [accuracy], got {value!r}; known: {', '.join(METRICS)}")
    calls = tuple(_metric(entry, f"{key}[{i}]") for i, entry in enumerate(value))
    names = [call()[0] for call in calls]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ConfigError(
            f"{key}: two metrics are called {twice!r}; give one another name, {{name: ..., as: {twice}_2}}"
        )
    for name, other in product(names, (*names, "loss")):
        if name in (f"{other}_{k}" for k in SPREAD):
            raise ConfigError(
                f"{key}: {name!r} is what rows call the spread of {other!r} over clients; give it another name, "
                f"{{name: ..., as: {name.removeprefix(other)[1:]}_of_{other}}}"
            )
    return calls


def _metric(value: Any, key: str) -> Call:
    target, name, rest = named(METRICS, value, key)
    label = rest.pop("as", None)
    made = target if isinstance(target, Metric) else Metric(target)
    function, arguments = _function(made.function, rest, key)
    own = {} if label is None else {"as": label}
    label = re.split(r"[:.]", name)[-1] if label is None else label
    if not isinstance(label, str) or not label.isidentifier() or label == "loss":
        raise ConfigError(f"{key}.as: expected a name for the row, such as macro_f1, got {label!r}")
    made = replace(made, function=_forgetful(function))
    return Call(lambda: (label, made), {}, {"name": name, **own, **arguments}, key)


def _function(target: Any, arguments: Mapping[str, Any], key: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(a function of outputs and targets, its arguments with every default): the class made, or the function bound."""
    if isinstance(target, type):
        call = decode(target, arguments, key)
        return call(), _plain(call, arguments)
    try:
        own = parameters(target)
    except (TypeError, ValueError):  # a callable object, or a function written in C
        own = {}
    if not own:
        return (partial(target, **arguments) if arguments else target), dict(arguments)
    call = decode(target, arguments, key, later=list(own)[:2])
    return (partial(target, **call.arguments) if call.arguments else target), _plain(call, arguments)


def _plain(call: Call, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a file can hold of a call's arguments: a library's defaults may be anything."""
    return {k: v for k, v in call.resolved.items() if k in given or isinstance(v, bool | int | float | str)}


def _forgetful(function: Any) -> Callable[[Tensor, Any], Any]:
    """Itself; of what gathers what it is given until it is reset, as torchmetrics' classes do, the value of a call."""
    if not all(callable(getattr(function, name, None)) for name in ("reset", "update", "compute")):
        return cast("Callable[[Tensor, Any], Any]", function)
    return partial(_value_alone, function)


def _value_alone(metric: Any, outputs: Tensor, targets: Any) -> Any:
    metric.reset()
    metric.update(outputs, targets)
    return metric.compute()
