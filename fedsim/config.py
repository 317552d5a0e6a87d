"""The experiment file: strict, typed, and helpful about mistakes.

`decode` checks what a section says against the signature of the callable that it is for, and gives a `Call`: target
and arguments, to be called once what the file does not hold is known (a layout, the number of clients). So a new
field of a dataclass is a new key of the file. Entries of tables (`{name: dirichlet, alpha: 0.1}`, or the user's own
code by import path, `name: mypkg.mymodule:MyClass`) are decoded in the same way, nested ones included. A call keeps
its section with every default (`resolved`), which is what the run folder keeps. A whole file is a section too, whose
key is empty.

An error is `key: problem` from the start; who knows the file's name puts it in front (`naming`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from fedsim.hints import checked, parameters, plain_default


class ConfigError(ValueError):
    """A mistake in the experiment file or in the data it names; the command line answers it with exit code 2."""


@contextmanager
def at(key: str) -> Iterator[None]:
    """A ValueError inside is a mistake at `key` of the file."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"{key}: {e}") from e


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Mistakes inside are mistakes of this file."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{source}: {e}") from e


def first_line(error: BaseException) -> str:
    """An exception's kind and the first line of its text, for messages: compilers write pages."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class FromTable:
    """Marks a parameter whose value is a table entry: `Annotated[Aggregator, FromTable("aggregator", "mean")]`.

    Args:
        kind: which table, a key of the `kinds` that it is decoded with.
        default: the entry when the file names none; None leaves the parameter's own default.
    """

    kind: str
    default: str | Mapping[str, Any] | tuple[Any, ...] | None = None


OBJECT = "<object>"


class Given:
    """What stands in a file for the name of a table entry when that was given from Python.

    No dataclass, which the reader of files would take for a section.

    Args:
        target: what to call.
        name: for the resolved file: an import path, where one leads there, else OBJECT and the class or function.
    """

    def __init__(self, target: Callable[..., Any], name: str) -> None:
        self.target, self.name = target, name

    def __repr__(self) -> str:
        return self.name

    @classmethod
    def object(cls, value: object, target: Callable[[], Any]) -> Given:
        """An object, which the target gives."""
        return cls(target, f"{OBJECT} {type(value).__module__}.{type(value).__qualname__}")

    @classmethod
    def factory(cls, target: Callable[..., Any]) -> Given:
        """A function or a class."""
        named = target if hasattr(target, "__qualname__") else type(target)  # an object may be called, too
        module, name = named.__module__, named.__qualname__
        found = getattr(sys.modules.get(module), name, None) is target and module != "__main__"
        return cls(target, f"{module}:{name}" if found else f"{OBJECT} {module}.{name}")


def is_code(value: object) -> bool:
    """Whether this is a function or a class, which may stand where a file has its name."""
    return isinstance(value, type) or inspect.isroutine(value)


@dataclass(frozen=True, eq=False)
class Call:
    """A call that a section describes: what it says is checked, and it is made when the rest is known.

    Args:
        target: what to call.
        arguments: by name; nested calls are made first.
        resolved: the section as plain data, with every default.
        key: of the section, for messages.
        needs: what must be given. A nested call whose needs the outer one is not given goes to the outer target as it
            is, which makes it.
        check: (what was made, the entry's name) -> what to take instead; its ValueError names the key too.
    """

    target: Callable[..., Any]
    arguments: Mapping[str, Any]
    resolved: dict[str, Any]
    key: str
    needs: frozenset[str] = frozenset()
    check: Callable[[Any, str], Any] | None = None

    @property
    def name(self) -> str:
        """Of a table entry."""
        return str(self.resolved["name"])

    def takes(self, parameter: str) -> bool:
        """Whether the target has such a parameter."""
        return parameter in parameters(self.target)

    def __call__(self, **given: Any) -> Any:
        """Make it, with those of `given` that the target has parameters for and the file does not set.

        Raises:
            ConfigError: for the target's ValueError, and for any error of the user's own code, with its place.
        """
        arguments = given | {k: _made(v, given) for k, v in self.arguments.items()}
        known = parameters(self.target)
        try:
            made = self.target(**{k: v for k, v in arguments.items() if k in known})
        except ConfigError:
            raise
        except Exception as e:
            where = place(e, self.target)
            if isinstance(e, MemoryError) or "can't allocate memory" in str(e):  # numpy's, or torch's RuntimeError
                what = f"too large for this machine's memory ({first_line(e)}); make it smaller"
                raise ConfigError(f"{self.key}: {what}") from e
            if where is None and not isinstance(e, ValueError):
                raise
            kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
            raise ConfigError(f"{self.key}: {kind}{e}" + (f" ({where})" if where else "")) from e
        with at(self.key):
            return made if self.check is None else self.check(made, self.name)


_REQUIRED = inspect.Parameter.empty

Kinds = Mapping[str, Callable[[Any, str, "Kinds"], Any]]
"""{kind of `FromTable`: (value, key, kinds) -> the call that it describes, several, or the value itself}."""


def decode(
    target: Callable[..., Any], values: Any, key: str, kinds: Kinds | None = None, later: Collection[str] = ()
) -> Call:
    """The call of `target` with a section as keyword arguments, every value checked against the type hints.

    Args:
        target: any callable with type hints.
        values: the section; None is an empty one.
        key: of the section.
        kinds: how to decode parameters marked `FromTable`.
        later: parameters that are given when it is called, which the file may not set.

    Raises:
        ConfigError: for a key that is unknown or missing, or a value of the wrong type.
    """
    values = {} if values is None else values
    own = {k: p for k, p in parameters_at(key, target).items() if k not in later}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}: expected a section of key: value lines ({', '.join(own)}), got {values!r}")
    below = f"{key}." if key else ""
    for name in values:
        if name in later:
            raise ConfigError(f"{below}{name}: is not set here but by its own section of the file")
        if name not in own:
            unknown = f"unknown {'key' if key else 'section'}"
            raise ConfigError(f"{below}{name}: {unknown}{did_you_mean(str(name), own)}")
    arguments, resolved = {}, {}
    for name, (hint, default) in own.items():
        entry = next((m.default for m in getattr(hint, "__metadata__", ()) if isinstance(m, FromTable)), None)
        if name in values or entry is not None:
            arguments[name] = _argument(values.get(name, entry), hint, f"{below}{name}", kinds or {})
            resolved[name] = _resolved(arguments[name], values.get(name))
        elif is_dataclass(hint) and isinstance(hint, type) and (default is _REQUIRED or default == hint()):
            arguments[name] = decode(hint, {}, f"{below}{name}", kinds)
            resolved[name] = arguments[name].resolved
        elif default is _REQUIRED:
            raise ConfigError(f"{below}{name}: missing; {key} needs it and it has no default")
        else:
            resolved[name] = plain_default(default)
    return Call(target, arguments, resolved, key)


def parameters_at(key: str, target: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Of a callable that the file names at a key; see `fedsim.hints.parameters`.

    Raises:
        ConfigError: if it does not say what they are.
    """
    try:
        return parameters(target)
    except NameError as e:
        raise ConfigError(f"{key}: the type hints of {target!r} can't be read: {e}; import what they name") from e
    except (TypeError, ValueError) as e:  # a class of C has none
        raise ConfigError(
            f"{key}: {target!r} does not say what parameters it takes ({e}); wrap it in a function"
        ) from e


def decode_entry(
    table: Mapping[str, Callable[..., Any]],
    value: Any,
    key: str,
    kinds: Kinds | None = None,
    *,
    needs: Collection[str] = (),
    fills: Collection[str] = (),
    check: Callable[[Any, str], Any] | None = None,
) -> Call:
    """The call of a table entry written as a name or as {name: ..., fields}.

    Args:
        table: {name: callable}.
        value, key, kinds: see `decode`.
        needs: parameters that are given when it is called, which the file may not set.
        fills: parameters that are given as well, where the file does not set them.
        check: see `Call`.
    """
    target, name, rest = named(table, value, key)
    found = decode(target, rest, key, kinds, {*needs, *(k for k in fills if k not in rest)})
    return Call(target, found.arguments, {"name": name, **found.resolved}, key, frozenset({*needs, *fills}), check)


def named(table: Mapping[str, Any], value: Any, key: str) -> tuple[Any, str, dict[str, Any]]:
    """(row of the table or the user's own callable, name, remaining fields) of a table entry."""
    rest = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = rest.pop("name", None)
    if is_code(name):
        name = Given.factory(name)
    if not isinstance(name, str | Given):
        raise ConfigError(f"{key}: expected a name or {{name: ..., ...}}, got {value!r}; known: {', '.join(table)}")
    if isinstance(name, Given):
        own = (k for k, v in table.items() if v is name.target)
        return name.target, next(own, name.name), rest
    if name.startswith(OBJECT):
        raise ConfigError(f"{key}.name: {name} was given from Python, where a file can't find it; give it there again")
    if ":" in name:
        return imported(name, f"{key}.name"), name, rest
    if name not in table:
        raise ConfigError(f"{key}.name: unknown name {name!r}{as_import_path(name) or did_you_mean(name, table)}")
    return table[name], name, rest


def imported(path: str, key: str) -> Callable[..., Any]:
    """The user's own code by import path `pkg.module:name`."""
    module, _, attribute = path.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        way_out = "run from the folder that holds it or set PYTHONPATH"
        raise ConfigError(f"{key}: can't import {path!r}: {e}; {way_out}") from e
    except AttributeError as e:
        raise ConfigError(f"{key}: module {module!r} has no {attribute!r}") from e
    except Exception as e:
        raise ConfigError(f"{key}: importing {path!r} failed: {type(e).__name__}: {e}") from e
    if not callable(found):
        raise ConfigError(f"{key}: {path!r} is a {type(found).__name__}, not a class or function")
    return typing.cast("Callable[..., Any]", found)


def _made(value: Any, given: Mapping[str, Any]) -> Any:
    """An argument with the nested calls made that have all they need."""
    if isinstance(value, tuple):
        return tuple(_made(v, given) for v in value)
    if isinstance(value, Call) and value.needs <= given.keys():
        return value(**{k: given[k] for k in value.needs})
    return value


def _argument(value: Any, hint: Any, key: str, kinds: Kinds) -> Any:
    """The checked value of one field; a call where it is a table entry or a section."""
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, FromTable):
            value = mark.default if value is None else value
            return None if value is None else kinds[mark.kind](value, key, kinds)
    optional = typing.get_origin(hint) is types.UnionType and value is not None
    for section in typing.get_args(hint) if optional else (hint,):
        if is_dataclass(section) and isinstance(section, type):
            return decode(section, value, key, kinds)
    if isinstance(value, Given) or is_code(value):
        raise ConfigError(f"{key}: no function or class can stand here, where no table entry has its name; got {value}")
    with at(key):
        return checked(value, hint)


def _resolved(argument: Any, value: Any) -> Any:
    """What to record of a field: what the file said, nested sections with every default."""
    if isinstance(argument, Call):
        return argument.resolved
    if isinstance(argument, tuple) and any(isinstance(a, Call) for a in argument):
        return [a.resolved for a in argument]
    return value


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
