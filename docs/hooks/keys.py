"""The reference of the experiment file, as Markdown: every section, every table, every entry, every key.

All of it is read from the code: parameters, their types and defaults, and the `Args` of docstrings.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any

from fedsim.cli import one_line
from fedsim.compose import TABLES
from fedsim.compose.sections import File
from fedsim.config import FromTable
from fedsim.hints import parameters, plain_default
from fedsim.optim.rule import RuleSettings
from fedsim.optim.settings import Settings
from fedsim.optim.table import Entry

GIVEN = {
    "strategies": {"local", "layout", "count"},
    "tasks": {"seed", "count", "clients", "device", "partition", "client_test"},
    "models": {"input_shape", "num_classes"},
    "devices": {"count"},
    "availability": {"count"},
}
"""What entries of these tables are given from elsewhere in the file, so that it is no key of theirs."""

KINDS = {"strategy": "strategies", "server_optimizer": "optimizers"}
"""Kinds of `FromTable` whose table has another name than the kind, with an s or not."""


@dataclass(frozen=True)
class Key:
    """One key: its type and default as text, and what it means."""

    name: str
    type: str
    default: str
    meaning: str


def pages() -> dict[str, str]:
    """{title: Markdown} of the whole reference, the file's sections first."""
    return {"The file": _file()} | {_title(name): _table(name) for name in TABLES}


def address(title: str) -> str:
    """Where the page of that title lies, seen from docs/."""
    return f"reference/{title.lower().replace(' ', '_')}.md"


def keys(target: Callable[..., Any], given: set[str] | None = None) -> list[Key]:
    """What a section or an entry may hold, in the order in which it is declared."""
    said = meanings(target)
    found = parameters(target).items()
    return [Key(n, _type(h), _default(h, d), said.get(n, "")) for n, (h, d) in found if n not in (given or ())]


def meanings(target: Callable[..., Any]) -> dict[str, str]:
    """{parameter: what its docstring says}, those of base classes and of `__init__` among them."""
    places = [*reversed(target.__mro__), target.__init__] if isinstance(target, type) else [target]
    out: dict[str, str] = {}
    for place in places:
        doc = inspect.cleandoc(place.__doc__ or "")
        block = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE)
        for names, text in re.findall(
            r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", block[1] if block else "", re.MULTILINE
        ):
            out |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return out


def _file() -> str:
    """The page of the file's own sections."""
    lines = [
        "# The experiment file",
        "Every section with its keys. `fedsim check FILE` refuses what is not listed, with the nearest name that is.",
        "A value that is an entry of a table is written as a name, or as `{name: ..., keys of the entry}`; in place of "
        "a name stands the import path of your own code, `pkg.module:name`.",
        "## At the top",
        _rows(keys(File)),
    ]
    for name, section, doc in _sections(File, ""):
        lines += [f"## {name}", doc, _rows(keys(section))]
    return "\n\n".join(lines) + "\n"


def _sections(target: type, prefix: str) -> Iterator[tuple[str, type, str]]:
    """(dotted name, class, first paragraph) of the sections inside a section, depth first."""
    for name, (hint, _) in parameters(target).items():
        if isinstance(hint, type) and is_dataclass(hint) and not _mark(hint):
            dotted = f"{prefix}{name}"
            yield dotted, hint, _paragraph(hint)
            yield from _sections(hint, f"{dotted}.")


def _table(name: str) -> str:
    """The page of one table: every entry with its keys."""
    lines = [f"# {_title(name)}", f"`fedsim list {name}` prints the names. Your own enters by its import path."]
    if name == "optimizers":
        lines += ["## Keys of every rule", _rows([*keys(RuleSettings), *keys(Settings)])]
    for entry, made in TABLES[name].items():
        target = made.rule if isinstance(made, Entry) else made
        lines += [f"## `{entry}`", one_line(made) if isinstance(made, str | Entry) else _paragraph(target)]
        if callable(target) and name not in ("engines", "sinks", "losses"):
            refused = set(target.traits.refused) if name == "strategies" else set()
            lines.append(_rows(keys(target, GIVEN.get(name, set()) | refused)))
    return "\n\n".join(lines) + "\n"


def _rows(found: Any) -> str:
    """Keys as a Markdown table."""
    rows = [f"| `{k.name}` | {k.type} | {k.default} | {k.meaning.replace('|', chr(92) + '|')} |" for k in found]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]) if rows else "No keys."


def _mark(hint: Any) -> FromTable | None:
    return next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, FromTable)), None)


def _type(hint: Any) -> str:
    """A type as a reader of YAML knows it, linked where it is a table's entry."""
    if mark := _mark(hint):
        table = KINDS.get(mark.kind, mark.kind if mark.kind in TABLES else f"{mark.kind}s")
        if table not in TABLES:
            return "section"
        return f"[{table.replace('_', ' ')}]({address(_title(table)).removeprefix('reference/')})"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in arguments))
    if is_dataclass(hint) and isinstance(hint, type):
        return "section: " + ", ".join(f"`{name}`" for name in parameters(hint))
    if origin is not None:
        inner = _many(next(_type(a) for a in reversed(arguments) if a is not Ellipsis))
        return f"section of {inner}" if issubclass(origin, typing.Mapping) else f"list of {inner}"  # type: ignore[arg-type]
    return str(getattr(hint, "__name__", hint))


def _many(word: str) -> str:
    """A type's name in the plural."""
    return f"lists of {rest}" if (rest := word.removeprefix("list of ")) != word else f"{word}s"


def _default(hint: Any, default: Any) -> str:
    """A default as the file would write it."""
    mark = _mark(hint)
    if mark is not None and mark.default is not None:
        default = mark.default
    if default is inspect.Parameter.empty:
        return "" if is_dataclass(hint) else "needed"
    plain = plain_default(default)
    if is_dataclass(default) or isinstance(plain, dict) and len(plain) > 3:
        return ""
    text = (
        {None: "null", True: "true", False: "false"}.get(plain, str(plain)) if isinstance(plain, bool | None) else plain
    )
    return f"`{text}`"


def _paragraph(target: Any) -> str:
    """The text of a docstring before its Args and examples."""
    doc = inspect.cleandoc(target.__doc__ or "")
    return re.split(r"\n\n(?=Args:|Returns:|Raises:|Attributes:|Letters:|Shapes:|>>>)|^Args:", doc)[0].strip()


def _title(table: str) -> str:
    return table.replace("_", " ").capitalize()
