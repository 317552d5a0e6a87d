"""The reference of the experiment file, as Markdown: every section, every table, every entry, every key.

All of it is read from the code: parameters, their types and defaults, and the `Args` of docstrings.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any

from fedsim.compose import TABLES
from fedsim.compose.keys import NEEDED, TABLE_OF, Key, keys_of, keys_of_entry, mark_of, paragraph, text_of
from fedsim.compose.sections import File
from fedsim.hints import parameters
from fedsim.optim.rule import RuleSettings
from fedsim.optim.settings import Settings


def pages() -> dict[str, str]:
    """{title: Markdown} of the whole reference, the file's sections first."""
    return {"The file": _file()} | {_title(name): _table(name) for name in TABLES}


def address(title: str) -> str:
    """Where the page of that title lies, seen from docs/."""
    return f"reference/{title.lower().replace(' ', '_')}.md"


def _file() -> str:
    """The page of the file's own sections."""
    lines = [
        "# The experiment file",
        "Every section with its keys. `fedsim check FILE` refuses what is not listed, with the nearest name that is.",
        "A value that is an entry of a table is written as a name, or as `{name: ..., keys of the entry}`; in place of "
        "a name stands the import path of your own code, `pkg.module:name`.",
        "## At the top",
        _rows(keys_of(File)),
    ]
    for name, section, doc in _sections(File, ""):
        lines += [f"## {name}", doc, _rows(keys_of(section))]
    return "\n\n".join(lines) + "\n"


def _sections(target: type, prefix: str) -> Iterator[tuple[str, type, str]]:
    """(dotted name, class, first paragraph) of the sections inside a section, depth first."""
    for name, (hint, _) in parameters(target).items():
        if isinstance(hint, type) and is_dataclass(hint) and not mark_of(hint):
            dotted = f"{prefix}{name}"
            yield dotted, hint, text_of(hint)
            yield from _sections(hint, f"{dotted}.")


def _table(name: str) -> str:
    """The page of one table: every entry with its keys."""
    lines = [f"# {_title(name)}", f"`fedsim list {name}` prints the names. Your own enters by its import path."]
    shared: set[str] = set()
    if name == "optimizers":
        every = [*keys_of(RuleSettings), *keys_of(Settings)]
        shared = {key.name for key in every}
        lines += ["## Keys of every rule", _rows(every)]
    for entry in TABLES[name]:
        lines += [f"## `{entry}`", paragraph(name, entry)]
        if name in TABLE_OF.values():
            lines.append(_rows([key for key in keys_of_entry(name, entry) if key.name not in shared]))
    return "\n\n".join(lines) + "\n"


def _rows(found: Sequence[Key]) -> str:
    """Keys as a Markdown table."""
    cells = ((f"`{k.name}`", _type(k.hint), _default(k), k.meaning.replace("|", r"\|")) for k in found)
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]) if rows else "No keys."


def _type(hint: Any) -> str:
    """A type as a reader of YAML knows it, linked where it is a table's entry."""
    if mark := mark_of(hint):
        table = TABLE_OF.get(mark.kind)
        link = None if table is None else address(_title(table)).removeprefix("reference/")
        return "section" if table is None else f"[{table.replace('_', ' ')}]({link})"
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


def _default(key: Key) -> str:
    """A default as the file writes it; of a section with many keys, whose page has them, nothing."""
    if key.default is NEEDED:
        return "needed"
    return "" if isinstance(key.default, dict) and len(key.default) > 3 else f"`{key.default_text}`"


def _title(table: str) -> str:
    return table.replace("_", " ").capitalize()
