"""The experiment file: strict, typed, and helpful about mistakes.

A file is read into a `Reader`. The composition root asks it for each section, either as the arguments of a known
callable (`section`) or as an entry of a table (`entry`: `{name: dirichlet, alpha: 0.1}`, or the user's own code by
import path, `name: mypkg.mymodule:MyClass`). What a section may hold follows from the callable's signature and type
hints alone, so a new field of a dataclass is a new key of the file. Every value read, defaults included, is
recorded in `resolved`, which is what the run folder keeps.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError


class ConfigError(ValueError):
    """A mistake in the experiment file or in the data it names; the command line answers it with exit code 2."""


@dataclass(frozen=True)
class FromTable:
    """Marks a parameter whose value is a table entry: `Annotated[Aggregator, FromTable("aggregator", "mean")]`.

    Args:
        kind: which table, a key of `Reader.nested`.
        default: the entry when the file names none; None leaves the parameter's own default.
    """

    kind: str
    default: str | Mapping[str, Any] | None = None


Build = Callable[["Reader", str, Any], Any]
"""(reader, key, value) -> the object that a nested table entry describes."""


class Reader:
    """One experiment file, and what has been read from it.

    Args:
        raw: the file's content after overrides.
        source: how messages call it: a path, or "config".
        nested: how to build parameters marked `FromTable`, by kind.
    """

    def __init__(self, raw: Mapping[str, Any], source: str, nested: Mapping[str, Build] | None = None) -> None:
        self.raw, self.source = dict(raw), source
        self.nested = dict(nested or {})
        self.resolved: dict[str, Any] = {}
        self._read: list[str] = []

    def error(self, key: str, problem: str) -> ConfigError:
        """The error to raise for a key: file, key and problem in one line."""
        return ConfigError(f"{self.source}: {key}: {problem}")

    def value(self, key: str, kind: Any, default: Any) -> Any:
        """One plain top-level value."""
        self._read.append(key)
        value = self.raw.get(key, default)
        self.resolved[key] = value
        return self._checked(value, kind, key) if key in self.raw else default

    def section(self, key: str, target: Callable[..., Any], given: Mapping[str, Any] | None = None) -> Any:
        """Call `target` with a top-level section as its keyword arguments."""
        self._read.append(key)
        value = self.raw.get(key, {})
        built, self.resolved[key] = self.build(target, {} if value is None else value, key, given or {})
        return built

    def entry(
        self,
        key: str,
        table: Mapping[str, Callable[..., Any]],
        default: Any = None,
        given: Mapping[str, Any] | None = None,
    ) -> Any:
        """Build the table entry that a top-level section names."""
        self._read.append(key)
        value = self.raw.get(key, default)
        if value is None:
            raise self.error(key, f"missing; name one of {', '.join(table)}, or your own code as pkg.module:name")
        built, self.resolved[key] = self.build_entry(table, value, key, given or {})
        return built

    def build_entry(
        self, table: Mapping[str, Callable[..., Any]], value: Any, key: str, given: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """(object, resolved section) of a table entry written as a name or as {name: ..., fields}."""
        target, name, rest = self.named(table, value, key)
        built, resolved = self.build(target, rest, key, given)
        return built, {"name": name, **resolved}

    def named(
        self, table: Mapping[str, Callable[..., Any]], value: Any, key: str
    ) -> tuple[Callable[..., Any], str, dict[str, Any]]:
        """(callable, name, remaining fields) of a table entry."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise self.error(key, f"expected a name or {{name: ..., ...}}, got {value!r}; known: {', '.join(table)}")
        name = value["name"]
        rest = {k: v for k, v in value.items() if k != "name"}
        if ":" in name:
            return self.imported(name, f"{key}.name"), name, rest
        if name not in table:
            raise self.error(f"{key}.name", f"unknown name {name!r}{as_import_path(name) or did_you_mean(name, table)}")
        return table[name], name, rest

    def imported(self, path: str, key: str) -> Callable[..., Any]:
        """The user's own code by import path `pkg.module:name`."""
        module, _, attribute = path.partition(":")
        here = os.getcwd()
        if here not in sys.path:
            sys.path.insert(0, here)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as e:
            raise self.error(
                key, f"can't import {path!r}: {e}; run from the folder that holds it or set PYTHONPATH"
            ) from e
        except AttributeError as e:
            raise self.error(key, f"module {module!r} has no {attribute!r}") from e
        except Exception as e:
            raise self.error(key, f"importing {path!r} failed: {type(e).__name__}: {e}") from e
        if not callable(found):
            raise self.error(key, f"{path!r} is a {type(found).__name__}, not a class or function")
        return typing.cast("Callable[..., Any]", found)

    def build(
        self, target: Callable[..., Any], values: Any, key: str, given: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """(target(**values), resolved values), every value checked against the target's type hints."""
        arguments, resolved = self.bind(target, values, key, given)
        return self.call(target, {**given, **arguments}, key), resolved

    def bind(
        self, target: Callable[..., Any], values: Any, key: str, given: Iterable[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arguments, resolved values) for a later `call`; parameters named in `given` are not the file's to set."""
        if not isinstance(values, Mapping):
            raise self.error(key, f"expected a section of key: value lines, got {values!r}")
        try:
            own = {k: p for k, p in _parameters(target).items() if k not in given}
        except (NameError, TypeError) as e:
            raise self.error(key, f"the type hints of {target!r} can't be read: {e}; import what they name") from e
        for name in values:
            if name in given:
                raise self.error(f"{key}.{name}", "is not set here but by its own section of the file")
            if name not in own:
                raise self.error(f"{key}.{name}", f"unknown key{did_you_mean(str(name), own)}")
        arguments, resolved = {}, {}
        for name, (hint, default) in own.items():
            entry = next((m.default for m in getattr(hint, "__metadata__", ()) if isinstance(m, FromTable)), None)
            if name in values or entry is not None:
                value = values.get(name, entry)
                arguments[name], resolved[name] = self._argument(value, hint, f"{key}.{name}")
            elif default is inspect.Parameter.empty:
                raise self.error(f"{key}.{name}", f"missing; {key} needs it and it has no default")
            elif is_dataclass(hint) and isinstance(hint, type) and default == hint():
                arguments[name], resolved[name] = self.build(hint, {}, f"{key}.{name}", {})
            else:
                resolved[name] = _plain_default(default)
        return arguments, resolved

    def call(self, target: Callable[..., Any], arguments: Mapping[str, Any], key: str) -> Any:
        """Call a target with those arguments that it has parameters for.

        Its ValueError names the key; so does any error of the user's own code, with the place where it came from.
        """
        known = _parameters(target)
        try:
            return target(**{k: v for k, v in arguments.items() if k in known})
        except ConfigError:
            raise
        except Exception as e:
            where = place(e, target)
            if where is None and not isinstance(e, ValueError):
                raise
            kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
            raise self.error(key, f"{kind}{e}" + (f" ({where})" if where else "")) from e

    def finish(self) -> None:
        """Refuse top-level sections that nobody asked for."""
        for key in self.raw:
            if key not in self._read and key != "versions":
                raise self.error(str(key), f"unknown section{did_you_mean(str(key), self._read)}")

    def _argument(self, value: Any, hint: Any, key: str) -> tuple[Any, Any]:
        """(checked value, what to record) of one field, nested table entries and sections included."""
        for mark in getattr(hint, "__metadata__", ()):
            if isinstance(mark, FromTable):
                value = mark.default if value is None else value
                return (None, None) if value is None else self.nested[mark.kind](self, key, value)
        if is_dataclass(hint) and isinstance(hint, type):
            return self.build(hint, value, key, {})
        return self._checked(value, hint, key), value

    def _checked(self, value: Any, hint: Any, key: str) -> Any:
        if hint is Any:
            return value
        try:
            adapter = TypeAdapter(hint)
        except PydanticSchemaGenerationError as e:
            raise self.error(key, f"a file can't hold a {_describe(hint)}; give it a default and leave it out") from e
        try:
            return adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as e:
            raise self.error(key, f"expected {_describe(hint)}, got {_shown(value)}") from e
        except TypeError as e:
            raise self.error(key, f"can't be written as plain data: {value!r}") from e


def read_file(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A YAML file with dotted overrides (`a.b=value`) applied, as plain dictionaries.

    Raises:
        ConfigError: if the file is missing, is not YAML, or an override has no `=`.
    """
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1)
        what = "is a folder" if path.is_dir() else "no such file"
        hint = f"did you mean {str(folder / near[0])!r}?" if near else "name an experiment file (YAML)"
        raise ConfigError(f"{path}: {what}; {hint}")
    with _plain_errors(str(path)):
        from omegaconf import OmegaConf

        loaded = OmegaConf.load(path)
    return apply_overrides(loaded, parse_overrides(overrides, str(path)), str(path))


def parse_overrides(texts: Iterable[str], source: str) -> dict[str, Any]:
    """{dotted key: value} from `key.sub=value` texts; values are YAML.

    Raises:
        ConfigError: for a text without `=`, or whose value is not YAML.
    """
    from omegaconf import OmegaConf

    out: dict[str, Any] = {}
    for text in texts:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"{source}: override {text!r} has no key and '='; write key.sub=value")
        with _plain_errors(f"{source}: override {text!r}", BRACES if ":" in text else ""):
            value = OmegaConf.select(OmegaConf.from_dotlist([text]), key)
        if OmegaConf.is_dict(value) and any(":" in str(k) and v is None for k, v in value.items()):
            raise ConfigError(f"{source}: override {text!r}: not readable{BRACES}")
        out[key] = OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value
    return out


def apply_overrides(raw: Any, overrides: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Plain dictionaries from a mapping and dotted overrides.

    A value with a name of its own (`strategy=fedavg`, `strategy={name: fedfix, interval: 3}`) replaces the entry that
    was there, since fields of one entry mean nothing to another; other sections are merged.

    Raises:
        ConfigError: if a key leads into a value that is no section.
    """
    from omegaconf import OmegaConf

    with _plain_errors(source):
        config = raw if OmegaConf.is_config(raw) else OmegaConf.create(dict(raw))
        if not OmegaConf.is_dict(config):
            raise ConfigError(f"{source}: expected sections at the top, got a list or text")
        for key, value in overrides.items():
            _open_entry(config, key)
            named = isinstance(value, Mapping) and "name" in value
            OmegaConf.update(config, key, value, merge=not named, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
    return {str(k): v for k, v in plain.items()}


BRACES = "; in braces, put a space after each ':' and quote the whole, as in 'strategy={name: fedavg, cohort_size: 5}'"


@contextmanager
def _plain_errors(source: str, hint: str = "") -> Iterator[None]:
    """The YAML and merging libraries' errors as one line."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as e:
        raise ConfigError(f"{source}: not readable: {' '.join(str(e).split())}{hint}") from e


def _open_entry(config: Any, key: str) -> None:
    """Turn an entry written as a bare name into {name: ...} when an override goes below it."""
    from omegaconf import OmegaConf

    parts = key.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        value = OmegaConf.select(config, parent)
        if isinstance(value, str):
            OmegaConf.update(config, parent, {"name": value}, merge=False)


def _parameters(target: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (type hint, default)} of a callable's parameters."""
    body = target.__init__ if isinstance(target, type) and not is_dataclass(target) else target  # type: ignore[misc]
    hints = typing.get_type_hints(body, include_extras=True)
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


def _plain_default(default: Any) -> Any:
    """A default as plain data for the resolved file; objects are named by their class."""
    if is_dataclass(default) and not isinstance(default, type):
        return {f.name: _plain_default(getattr(default, f.name)) for f in fields(default)}
    return list(default) if isinstance(default, tuple) else default


def _shown(value: Any) -> str:
    """A value as a file writes it."""
    return (
        {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else repr(value)
    )


def _describe(hint: Any) -> str:
    """A type in a user's words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin in (list, tuple, Sequence):
        inner = [a for a in arguments if a is not Ellipsis]
        return f"a list of {_describe(inner[0])}s".replace("a list of a ", "a list of ") if inner else "a list"
    if origin is dict:
        return "a section"
    if arguments:
        return " or ".join(dict.fromkeys(_describe(a) for a in arguments))
    return getattr(hint, "__name__", str(hint))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def as_import_path(name: str) -> str:
    """What to say of an unknown name that is a dotted path, as no name of ours is; of another name nothing."""
    module, _, attribute = name.rpartition(".")
    dotted = bool(module) and all(part.isidentifier() for part in name.split("."))
    return f"; an import path is written '{module}:{attribute}'" if dotted else ""


def place(error: BaseException, target: object) -> str | None:
    """Where the user's own code `target` (a callable or an object) raised: file and line; None for code of ours."""
    module = getattr(target, "__module__", None) or type(target).__module__
    if module.partition(".")[0] == "fedsim":
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename == file] or frames
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else module
