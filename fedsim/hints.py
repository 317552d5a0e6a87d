"""What type hints say: a callable's parameters, and plain values checked against a hint, in a user's words."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import FunctionType
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError


def parameters(target: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (type hint, default)} of a callable's parameters."""
    body = target.__init__ if isinstance(target, type) and not is_dataclass(target) else target  # type: ignore[misc]
    hints = type_hints(body)
    if is_dataclass(target) and isinstance(target, type):
        out = {}
        for f in fields(target):
            if f.init:
                default = f.default if f.default is not MISSING else inspect.Parameter.empty
                if f.default_factory is not MISSING:
                    default = f.default_factory()
                out[f.name] = (hints[f.name], default)
        return out
    signature = inspect.signature(target)
    return {
        k: (hints.get(k, Any), p.default)
        for k, p in signature.parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


_KNOWN: WeakKeyDictionary[Callable[..., Any], dict[str, Any]] = WeakKeyDictionary()


def type_hints(body: Callable[..., Any]) -> dict[str, Any]:
    """{name: type hint} of a callable or a class.

    Kept, since a file asks for the same parameters many times and working out hints is most of reading it; but
    only for as long as the callable is, or every run would leave the functions that were made for it.
    """
    if not isinstance(body, FunctionType | type):
        return typing.get_type_hints(body, include_extras=True)
    if body not in _KNOWN:
        _KNOWN[body] = typing.get_type_hints(body, include_extras=True)
    return _KNOWN[body]


@dataclass(frozen=True)
class Within:
    """Marks a hyper-parameter that lies in [low, high), or [low, high] if `closed`."""

    low: float
    high: float
    closed: bool = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, a number or one number per client."""
        for v in value if isinstance(value, tuple) else (value,):
            if not (self.low <= v < self.high or self.closed and v == self.high):
                return f"must lie in [{self.low:g}, {self.high:g}{']' if self.closed else ')'}, got {v!r}"
        return None


def checked(value: Any, hint: Any) -> Any:
    """The value as the hint's type.

    Raises:
        ValueError: if it is of another type, or no file can hold one of that type, or a number needs more than 64 bits
            or is not `Within` its bounds.
    """
    if (found := _too_long(value)) is not None:
        raise ValueError(f"{found} needs more than the 64 bits that a whole number may have")
    if hint is Any:
        return value
    try:
        adapter = TypeAdapter(hint)
    except PydanticSchemaGenerationError as e:
        raise ValueError(f"a file can't hold a {described(hint)}; give it a default and leave it out") from e
    try:
        made = adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as e:
        raise ValueError(f"expected {described(hint)}, got {_shown(value)}") from e
    except TypeError as e:
        raise ValueError(f"can't be written as plain data: {value!r}") from e
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Within) and (problem := mark.problem(made)):
            raise ValueError(problem)
    return made


def _too_long(value: Any) -> int | None:
    """A whole number in plain data that no 64 bits hold."""
    if isinstance(value, list | tuple | dict):
        inner = map(_too_long, value.values() if isinstance(value, dict) else value)
        return next((found for found in inner if found is not None), None)
    return value if isinstance(value, int) and not -(2**63) <= value < 2**63 else None


def plain_default(default: Any) -> Any:
    """A default as plain data for the resolved file; objects are named by their class."""
    if is_dataclass(default) and not isinstance(default, type):
        return {f.name: plain_default(getattr(default, f.name)) for f in fields(default)}
    return list(default) if isinstance(default, tuple) else default


def _shown(value: Any) -> str:
    """A value as a file writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def described(hint: Any) -> str:
    """A type in a user's words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    words[Any] = "anything"
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and is_dataclass(hint):
        return f"a section {{{', '.join(f'{f.name}: ...' for f in fields(hint)[:3])}}}"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return described(arguments[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin in (list, tuple, Sequence):
        inner = [a for a in arguments if a is not Ellipsis]
        return f"a list of {_several(described(inner[0]))}" if inner else "a list"
    if origin in (dict, Mapping):
        return "a section"
    if arguments:
        return " or ".join(dict.fromkeys(described(a) for a in arguments))
    return getattr(hint, "__name__", str(hint))


def _several(one: str) -> str:
    """More than one of something, in a user's words: numbers, lists of numbers."""
    if " or " in one:
        return one
    head, of, rest = one.removeprefix("a ").partition(" of ")
    return f"{head}s{of}{rest}"
