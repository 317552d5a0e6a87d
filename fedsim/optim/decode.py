"""Strict decoding of a mapping into a frozen dataclass of plain values: typed, with "did you mean" errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from torch import Tensor

_T = TypeVar("_T")


def decode(cls: type[_T], section: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> _T:
    """A frozen dataclass from a mapping: unknown keys and wrong types are errors that name the key."""
    known = {f.name: str(f.type) for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in section.items():
        suggest(key, (*known, *also), where)
        if key not in known:
            raise ValueError(f"{where}: key {key!r} does not belong to {cls.__name__} here")
        values[key] = _coerce(f"{where}.{key}", known[key], value)
    return cls(**values)


def suggest(key: str, known: Sequence[str], where: str, what: str = "key") -> None:
    """Refuse an unknown key (or whatever `what` calls it), with the nearest known one."""
    if key in known:
        return
    near = get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    raise ValueError(f"{where}: unknown {what} {key!r}; {hint}")


def _coerce(where: str, kind: str, value: Any) -> Any:
    if kind.endswith("| None"):
        if value is None:
            return None
        kind = kind[: -len("| None")].strip()
    if kind == "Hyper":
        if isinstance(value, Tensor):
            value = value.tolist()
        if isinstance(value, list | tuple):
            return tuple(_number(where, v) for v in value)
        return _number(where, value)
    if kind == "float":
        return _number(where, value)
    plain = {"int": int, "bool": bool, "str": str}.get(kind)
    if plain is None:
        return value
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be a {kind}, got {value!r}")
    return value


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} must be a number, got {value!r}")
    return float(value)
