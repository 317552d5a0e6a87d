"""What a page is made of, and its rendering: one HTML file, styles and pictures inside, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedsim.files import write_whole

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEXT = 100_000  # letters of a configuration that a page shows


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One result in large type: its label, its value with the unit, and perhaps a remark."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a legend: a colour of `draw`'s palette, and how the line is broken."""

    text: str
    colour: str
    dash: int = 0
    band: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An <svg> made by `draw`, with its title."""

    title: str
    svg: str
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows, the first column to the left and the others to the right.

    Args:
        style: `prose` puts all columns to the left, `left` the last one, and both let it wrap.
        fold: where not empty, the table is folded behind this text.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    style: Literal["", "prose", "left"] = ""
    fold: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what belongs to it; parts left empty are not shown, nor a heading over none."""

    title: str
    text: str = ""
    keys: Sequence[Key] = ()
    pictures: Sequence[Picture] = ()
    table: Table | None = None
    code: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page; sections that show nothing are left out. `notices` are for what a reader must not miss."""

    title: str
    kind: str
    facts: Sequence[str] = ()
    notices: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section | None] = ()

    def html(self) -> str:
        """The page rendered; all text is escaped."""
        shown = [s for s in self.sections if s is not None and (s.pictures or s.table or s.code)]
        return _template().render(page=replace(self, sections=shown))

    def write(self, path: Path) -> Path:
        """Render to `path`, whole or not at all."""
        write_whole(path, self.html())
        return path


def shortened(text: str, most: int = MAX_TEXT) -> str:
    """Text cut to `most` letters, saying so."""
    return text if len(text) <= most else f"{text[:most]}\n… {len(text) - most:,} more letters"


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
