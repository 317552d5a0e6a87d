"""What may stand in a section or in an entry of a table: every key with its type, default and meaning.

All of it is read from the code: parameters, their type hints and defaults, and the `Args` of docstrings.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

from fedsim.compose.entries import GIVEN
from fedsim.compose.tables import TABLES
from fedsim.config import FromTable, named, parameters_at
from fedsim.hints import described, parameters, plain_default
from fedsim.optim.rule import RuleSettings
from fedsim.optim.schedules import Schedule
from fedsim.optim.settings import Settings
from fedsim.optim.spec import is_rule
from fedsim.optim.table import RULES, Entry
from fedsim.strategy import Strategy

NEEDED = inspect.Parameter.empty
PLACES = {
    "strategies": ("strategy", "strategy"),
    "selections": ("selection", "strategy.selection"),
    "topologies": ("topology", "strategy.topology"),
    "optimizers": ("optimizer", "local.optimizer"),
    "schedules": ("schedule", "local.optimizer.schedule"),
    "aggregators": ("aggregator", "strategy.aggregator"),
    "pre_aggregators": ("pre_aggregators", "strategy.pre_aggregators"),
    "partitions": ("partition", "partition"),
    "datasets": ("dataset", "task.dataset"),
    "models": ("model", "task.model"),
    "devices": ("device", "clients.devices"),
    "availability": ("availability", "clients.availability"),
    "compressors": ("compressor", "uplink.compressor"),
    "attacks": ("attack", "clients.byzantine.attack"),
    "tasks": ("task", "task"),
    "proxes": ("prox", "task.prox"),
    "losses": ("loss", "task.loss"),
    "sinks": ("sinks", "log.sinks"),
}
"""{table: (kind of `FromTable`, a key of the file where its entries stand)}; entries of other tables have no keys."""
TABLE_OF = {kind: table for table, (kind, _) in PLACES.items()} | {
    "server_optimizer": "optimizers",
    "metrics": "metrics",
}
"""{kind of `FromTable`: the table of its entries}."""


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        name: of the key.
        hint: its type hint.
        default: as plain data; `NEEDED` where there is none.
        meaning: what the docstring says of it, in one line; empty if nothing.
    """

    name: str
    hint: Any
    default: Any
    meaning: str

    @property
    def type(self) -> str:
        """In a user's words."""
        mark = mark_of(self.hint)
        if mark is None:
            return described(self.hint)
        table = TABLE_OF.get(mark.kind)
        return f"an entry of {table}" if table else "a section"

    @property
    def default_text(self) -> str:
        """As a file writes it."""
        if isinstance(self.default, dict) and not any(v is not None for v in self.default.values()):
            return "{}"
        return "needed" if self.default is NEEDED else yaml_of(self.default)


def keys_of(target: Callable[..., Any], given: tuple[str, ...] = ()) -> list[Key]:
    """What a section or an entry may hold, its own keys before those of what it derives from, without what is given."""
    said, out = _meanings(target), []
    for name, (hint, default) in parameters(target).items():
        mark = mark_of(hint)
        if mark is not None and mark.default is not None:
            default = mark.default
        elif default is NEEDED and is_dataclass(hint):
            default = {}
        if name not in given:
            plain = NEEDED if default is NEEDED else plain_default(default)
            out.append(Key(name, hint, plain, said.get(name, "")))
    own = vars(target).get("__annotations__", {}) if isinstance(target, type) else {}
    return sorted(out, key=lambda key: key.name not in own)


def keys_of_entry(table: str, name: str) -> list[Key]:
    """The keys of an entry of a table, or of the user's own by import path.

    Raises:
        ConfigError: for an unknown name.
    """
    target = named(TABLES[table], name, table)[0]
    if table not in PLACES:
        return []
    if table == "optimizers":
        return _keys_of_rule(name, target)
    if table == "schedules":
        return [key for key in keys_of(Schedule) if key.name != "name"]
    refused = tuple(target.traits.refused) if isinstance(target, type) and issubclass(target, Strategy) else ()
    parameters_at(f"list {table} {name}", target)
    return keys_of(target, (*GIVEN.get(PLACES[table][0], ()), *refused))


def paragraph(table: str, name: str) -> str:
    """What an entry is: its docstring up to its Args, or its remark."""
    target = named(TABLES[table], name, table)[0]
    if isinstance(target, str):
        return target
    text = text_of(target.rule if isinstance(target, Entry) else target)
    return f"{target.note}\n\n{text}" if isinstance(target, Entry) else text


def text_of(target: Any) -> str:
    """A docstring up to its Args or the like."""
    return re.split(r"\n\n(?=\w+:\n|>>>)|^Args:", inspect.cleandoc(target.__doc__ or ""))[0].strip()


def yaml_of(value: Any) -> str:
    """Plain data on one line, as a file writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {yaml_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_of, value)) + "]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w:./-]*", value)
    if plain and value.lower() not in ("null", "true", "false", "yes", "no", "on", "off"):
        return str(value)
    return json.dumps(value, default=lambda other: type(other).__name__)


def _keys_of_rule(name: str, target: Any) -> list[Key]:
    """Its own, then those of every rule, then those of the whole optimizer; with what the name stands for."""
    rule = target.rule if isinstance(target, Entry) else target
    if not is_rule(rule):  # of torch: its class has its own keys
        return keys_of(rule, ("params",))
    found = [*keys_of(rule), *keys_of(RuleSettings), *keys_of(Settings)]
    own = {"lr": rule.default_lr, "weight_decay": rule.default_weight_decay, "decay": rule.decay}
    own = {k: v for k, v in own.items() if v is not None}
    if name in RULES:
        own |= {**(RULES[name].preset or {}), **(RULES[name].settings or {})}
    return [Key(k.name, k.hint, plain_default(own.get(k.name, k.default)), k.meaning) for k in found]


def _meanings(target: Any) -> dict[str, str]:
    """{parameter: what the docstrings say}, those of base classes and of `__init__` among them."""
    places = (
        [*reversed(target.__mro__), inspect.getattr_static(target, "__init__")]
        if isinstance(target, type)
        else [target]
    )
    out: dict[str, str] = {}
    for place in places:
        block = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.cleandoc(place.__doc__ or ""), re.MULTILINE)
        for names, text in re.findall(
            r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", block[1] if block else "", re.MULTILINE
        ):
            out |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return out


def mark_of(hint: Any) -> FromTable | None:
    """Which table a key's value is an entry of, if it is one."""
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, FromTable)), None)
