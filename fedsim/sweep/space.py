"""What a sweep goes through, as the command line writes it.

key=value                the same for all runs, as in `fedsim run`
key=a,b,c                each of these; a comma inside brackets, braces or quotes is part of a value
key=log(1e-3,1)          a range to draw from: log (evenly in the logarithm), uniform, or int; both ends belong to it
METHOD:key=...           for the runs of one method alone, which is a value of the key that `--per` names
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from math import exp, floor, log
from typing import Any, Literal
from zlib import crc32

from fedsim.config import ConfigError, did_you_mean
from fedsim.overrides import parse_overrides

NAME_LETTERS = 180  # of a run's folder; file systems take 255 bytes
_RANGE = re.compile(r"(\w+)\((.*)\)")


@dataclass(frozen=True)
class Choice:
    """Values of which each is tried."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both of them included.

    Args:
        kind: evenly between the ends (`uniform`), evenly in the logarithm (`log`), or whole numbers (`int`).

    >>> [Range("log", 0.01, 1).at(u) for u in (0, 0.5)], Range("int", 1, 3).at(0.99)
    ([0.01, 0.1], 3)
    """

    kind: Literal["uniform", "log", "int"]
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"{self} is empty; the lower end comes first")
        if self.kind == "log" and self.low <= 0:
            raise ValueError(f"{self}: 0 and what is below has no logarithm; begin above it or use uniform")
        if self.kind == "int" and (self.low != int(self.low) or self.high != int(self.high)):
            raise ValueError(f"{self}: both ends must be whole numbers")

    def __str__(self) -> str:
        return f"{self.kind}({self.low:g},{self.high:g})"

    def at(self, share: float) -> float | int:
        """The number below which a share (in [0, 1)) of all draws lies, to four digits."""
        if self.kind == "int":
            return self.plain(self.low + floor(share * (self.high - self.low + 1)))
        if self.kind == "uniform":
            return self.plain(self.low + share * (self.high - self.low))
        return self.plain(exp(log(self.low) + share * (log(self.high) - log(self.low))))

    def plain(self, value: float) -> float | int:
        """A whole number, or one of four digits: what the folder's name says is what was used."""
        return int(value) if self.kind == "int" else min(max(float(f"{value:.4g}"), self.low), self.high)


Axis = Choice | Range


@dataclass(frozen=True)
class Setting:
    """One point of the space, to be run with every seed.

    Args:
        method: whose it is, "" where methods are not told apart.
        values: {key: value} of the axes: what tells it from the others.
        overrides: {key: value} of everything, in the order in which they are applied.
    """

    method: str
    values: dict[str, Any]
    overrides: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its runs' folders.

        >>> Setting("", {"strategy.name": "fedavg", "local.optimizer.lr": 0.1}, {}).name
        'name=fedavg,lr=0.1'
        """
        short = _short(list(self.values))
        name = ",".join(f"{short[key]}={text_of(value)}" for key, value in self.values.items())
        return name if len(name) <= NAME_LETTERS else f"{name[:NAME_LETTERS]}-{crc32(name.encode()):08x}"


@dataclass(frozen=True)
class Method:
    """What is searched by itself, with a best setting of its own.

    Args:
        name: "" where methods are not told apart.
        entries: {key: value or axis} in the order in which they are applied.
        marks: keys that tell its settings from others' although they are no axes of its own.
    """

    name: str
    entries: dict[str, Any]
    marks: tuple[str, ...] = ()

    @property
    def axes(self) -> dict[str, Axis]:
        return {key: value for key, value in self.entries.items() if isinstance(value, Axis)}

    def setting(self, chosen: Mapping[str, Any]) -> Setting:
        """The setting with these values on the axes."""
        told = {key: self.entries[key] for key in self.marks} | {key: chosen[key] for key in self.axes}
        return Setting(self.name, told, {**self.entries, **chosen})

    def grid(self) -> list[Setting]:
        """Every combination of the axes' values; the last key varies fastest.

        Raises:
            ConfigError: if an axis is a range.
        """
        for key, axis in self.axes.items():
            if isinstance(axis, Range):
                raise ConfigError(f"sweep: {key}={axis} is a range; add --search random or tpe, or list values")
        values = [axis.values for axis in self.axes.values() if isinstance(axis, Choice)]
        return [self.setting(dict(zip(self.axes, chosen, strict=True))) for chosen in product(*values)]


@dataclass(frozen=True)
class Space:
    """All that a sweep goes through.

    Args:
        common: {key: value or axis} of all methods.
        own: {method: {key: value or axis}}, which go before the common ones.
        per: the key whose values are the methods, an axis of `common`; None for one search over all.

    Raises:
        ConfigError: if methods are named that there are not.
    """

    common: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    per: str | None = None

    def __post_init__(self) -> None:
        if "seed" in self.common and not isinstance(self.common["seed"], int):
            raise ConfigError("seed: give seeds as --seeds 0,1,2; they are folded to mean and deviation")
        if self.per is None:
            if self.own:
                raise ConfigError(f"sweep: {next(iter(self.own))}: names a method; say by --per KEY whose value it is")
            return
        axis = self.common.get(self.per)
        for method, entries in self.own.items():
            if "seed" in entries:
                raise ConfigError(f"{method}:seed: give seeds as --seeds 0,1,2; all methods are run with the same")
            if self.per in entries:
                raise ConfigError(f"{method}:{self.per}: is what --per tells methods apart by; leave it out here")
        if not isinstance(axis, Choice):
            raise ConfigError(f"--per {self.per}: is no list of values here; give {self.per}=a,b")
        names = [text_of(value) for value in axis.values]
        if strange := [name for name in self.own if name not in names]:
            raise ConfigError(f"sweep: {strange[0]}: is no value of {self.per}{did_you_mean(strange[0], names)}")

    def methods(self) -> list[Method]:
        """What is searched by itself: one for each value of `per`, else one in all."""
        if self.per is None:
            return [Method("", dict(self.common))]
        axis = self.common[self.per]
        rest = {key: value for key, value in self.common.items() if key != self.per}
        return [
            Method(name, {self.per: value, **rest, **self.own.get(name, {})}, (self.per,))
            for value in axis.values
            for name in [text_of(value)]
        ]


def parse_space(texts: Iterable[str], per: str | None, source: str) -> Space:
    """The space that texts describe; see the head of this file.

    Raises:
        ConfigError: for a text that is no override, no list and no range.

    >>> parse_space(["rounds=5", "local.optimizer.lr=0.1,1e-3"], None, "x.yaml").common
    {'rounds': 5, 'local.optimizer.lr': Choice(values=(0.1, 0.001))}
    """
    common: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for text in texts:
        head, equals, value = text.partition("=")
        owner, _, key = head.rpartition(":")
        sections = [own.setdefault(text_of(name), {}) for name in owner.split(",")] if owner else [common]
        for section in sections:
            section[key] = _entry(key, value, source) if equals and key else parse_overrides([text], source)
    return Space(common, own, per)


def text_of(value: Any) -> str:
    """A value as part of a folder's name; an entry of a table begins with its name.

    >>> text_of({"name": "dirichlet", "alpha": 0.1}), text_of([20, 30]), text_of(-0.5)
    ('dirichlet-alpha-0.1', '20-30', '-0.5')
    """
    if isinstance(value, Mapping):
        name = [value["name"]] if "name" in value else []
        value = [*name, *(part for key, v in value.items() if key != "name" for part in (key, v))]
    text = re.sub(r"^[^\w.+-]+|[^\w.+-]+$", "", str(value))  # brackets at the ends; a minus sign stays
    return re.sub(r"[^\w.+-]+", "-", text)


def _entry(key: str, text: str, source: str) -> Any:
    """The value or the axis that stands behind `key=`."""
    parts = _split(text)
    drawn = [_RANGE.fullmatch(part.strip()) for part in parts]
    if len(parts) == 1 and (found := drawn[0]):
        return _range(key, found[1], found[2])
    if any(drawn):
        raise ConfigError(f"{key}={text}: a range stands alone; give one range, or values")
    if not all(part.strip() for part in parts):
        raise ConfigError(f"{key}={text}: has an empty value; give {key}=a,b")
    values = [parse_overrides([f"{key}={part}"], source)[key] for part in parts]
    if len(values) == 1:
        return values[0]
    if len({text_of(value) for value in values}) < len(values):
        raise ConfigError(f"{key}={text}: two values are the same; give every value once")
    return Choice(tuple(values))


def _range(key: str, kind: str, inside: str) -> Range:
    ends = inside.split(",")
    try:
        if kind not in ("uniform", "log", "int") or len(ends) != 2:
            raise ValueError("no such range; write log(1e-3,1), uniform(0,1) or int(1,5)")
        return Range(kind, float(ends[0]), float(ends[1]))  # type: ignore[arg-type]
    except ValueError as e:
        raise ConfigError(f"{key}={kind}({inside}): {e}") from e


def _split(text: str) -> list[str]:
    """Text cut at the commas that stand in no bracket, brace or quote."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
    return parts


def _short(keys: list[str]) -> dict[str, str]:
    """The last part of each dotted key, or as many parts as tell them apart."""
    depth = 1
    while len({_tail(key, depth) for key in keys}) < len(keys):
        depth += 1
    return {key: _tail(key, depth) for key in keys}


def _tail(key: str, depth: int) -> str:
    return ".".join(key.split(".")[-depth:])
