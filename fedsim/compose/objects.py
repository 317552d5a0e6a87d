"""Objects that stand in a file's place: a module, data or a strategy given from Python.

They enter as the name of a table entry (`fedsim.config.Given`), and from there on all goes as for any other entry: the
fields beside the name are checked, what is known only later is passed, and the resolved file says what was given.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from fedsim.config import ConfigError, Given, first_line, is_code
from fedsim.data import Dataset
from fedsim.data.arrays import from_arrays
from fedsim.strategy import Strategy

PLACES = {"model": "task.model", "data": "task.dataset", "strategy": "strategy"}
"""Where in the file each stands."""


def as_overrides(*, model: Any = None, data: Any = None, strategy: Any = None) -> dict[str, Any]:
    """{dotted key: entry} of objects, for what they may be see `fedsim.run`; None leaves what the file says.

    An object stands for the whole entry; a function or class for its name, as one that is named on the command line.

    Raises:
        ConfigError: if an object can't stand there.
    """
    entries = {"model": _model(model), "data": _data(data), "strategy": _strategy(strategy)}
    return {PLACES[name]: entry for name, entry in entries.items() if entry is not None}


def completed(raw: Mapping[str, Any], *, model: Any = None, data: Any = None) -> dict[str, Any]:
    """A file's content with objects in it, and with what these say of the rest where the file says nothing."""
    out = dict(raw)
    if model is not None or data is not None:
        out["task"] = {"name": "classification", **out["task"]}
    owners = isinstance(data, tuple) and len(data) == 3 or isinstance(data, Dataset) and data.groups is not None
    if owners and out.get("partition") is None:
        out["partition"] = "natural"  # who names owners means them
    return out


Entry = dict[str, Any] | Given | None


def _model(value: Any) -> Entry:
    if isinstance(value, nn.Module):
        return {"name": Given.object(value, lambda: _copied(value))}
    return _factory("model", value, "a torch.nn.Module, or a function or class that makes one")


def _data(value: Any) -> Entry:
    if isinstance(value, tuple) and len(value) == 3:
        x, y, clients = value
        return {"name": Given.object(value, lambda: from_arrays(x, y, clients=clients))}
    return _factory("data", value) if is_code(value) or isinstance(value, partial) else _object(value)


def _strategy(value: Any) -> Entry:
    if isinstance(value, Strategy):
        return _object(value)
    return _factory("strategy", value, "a fedsim.Strategy, or a class or function that makes one")


def _object(value: Any) -> Entry:
    return None if value is None else {"name": Given.object(value, lambda: value)}


def _factory(name: str, value: Any, wanted: str = "") -> Entry:
    """A function or class; a partial one brings fields along, and so is an entry written whole."""
    if value is None:
        return None
    if isinstance(value, partial):
        if value.args:
            raise ConfigError(f"{PLACES[name]}: {name}= is a partial with places; give its arguments by name")
        return {**value.keywords, "name": Given.factory(value.func)}
    if not callable(value):
        raise ConfigError(f"{PLACES[name]}: {name}= takes {wanted}, got {type(value).__name__}")
    return Given.factory(value)


def _copied(module: nn.Module) -> nn.Module:
    """A run trains a copy."""
    try:
        return copy.deepcopy(module)
    except Exception as e:  # whatever the user's module holds
        raise ValueError(f"{type(module).__name__} can't be copied: {first_line(e)}; give what makes it") from e
