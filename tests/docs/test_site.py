"""The site: its guides and notebooks run as they stand, and its reference says what the code says.

`make docs` builds it strictly, which finds links that lead nowhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest

from docs.hooks import keys, notebooks
from fedsim.compose import TABLES, sections
from fedsim.data.sources import kept
from fedsim.history import History
from fedsim.strategies import STRATEGIES
from tests.docs.blocks import blocks, play

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = [DOCS / "quickstart.md", DOCS / "coming-from.md", *sorted((DOCS / "guides").glob("[!i]*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, from which modules are imported, and which leaves none of them behind."""
    backend, before = matplotlib.get_backend(), set(sys.modules)
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with kept():  # the digits, once
        yield tmp_path
    matplotlib.pyplot.close("all")
    matplotlib.use(backend)
    for name in set(sys.modules) - before:
        if not getattr(sys.modules[name], "__file__", None) or "site-packages" not in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.stem)
def test_a_guide_runs_as_it_stands(guide: Path, folder: Path) -> None:
    found = blocks(guide)
    play(found, folder, f"docs/{guide.name}")
    named = [
        c[c.index("--out") + 1]
        for b in found
        if b.language == "bash"
        for c in b.commands()
        if "run" in c and "--out" in c
    ]
    runs = [folder / name for name in named if not Path(name).suffix]
    assert runs and all(len(History.load(run)) > 1 for run in runs)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_as_it_stands(notebook: Path, folder: Path) -> None:
    names = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] or "plot" not in "".join(cell["source"]), "run `make notebooks`"
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    assert matplotlib.pyplot.get_fignums()


def test_a_notebook_becomes_a_page_with_what_it_printed_and_drew() -> None:
    text, pictures = notebooks.page(DOCS / "notebooks" / "compression.ipynb")
    assert "# Bits and compression" in text and "Mbit up" in text.rpartition("for name, history")[2]
    assert pictures and all(p.startswith(b"\x89PNG") for p in pictures.values())
    assert all(f"({name})" in text for name in pictures)


def test_there_are_five_notebooks() -> None:
    assert len(NOTEBOOKS) == 5


def test_every_entry_of_every_table_is_in_the_reference() -> None:
    pages = keys.pages()
    for table, entries in TABLES.items():
        text = pages[table.replace("_", " ").capitalize()]
        assert all(f"\n## `{name}`\n" in text for name in entries), table


def test_the_reference_gives_type_default_and_meaning_of_a_key() -> None:
    pages = keys.pages()
    fedfix = pages["Strategies"].partition("## `fedfix`")[2].partition("\n## ")[0]
    assert "| `interval` | number | needed | seconds of a window. |" in fedfix
    assert "| `server_lr` | number | `1.0` | the server's step along the pseudo-gradient. |" in fedfix  # inherited
    assert "| `local` |" not in fedfix, "a section of its own, and no key of a strategy"
    assert "[aggregators](aggregators.md)" in fedfix
    assert "| `selection` |" not in fedfix, "refused: every client is at work at all times"
    local = pages["The file"].partition("\n## local\n")[2].partition("\n## ")[0]
    assert "| `batch_size` | whole number or `full` | `20` |" in local
    assert "| `epochs` | whole number or null | `null` |" in local


def test_every_key_of_the_file_and_of_its_own_sections_has_a_meaning() -> None:
    own = {n: c for n, c in vars(sections).items() if isinstance(c, type) and c.__module__ == sections.__name__}
    silent = [f"{name}.{key.name}" for name, c in own.items() for key in keys.keys_of(c) if not key.meaning]
    assert {"File", "Runtime", "Local"} <= set(own) and not silent


def test_every_strategy_has_a_small_picture() -> None:
    for name in STRATEGIES:
        assert 1000 < (DOCS / "gallery" / f"{name}.png").stat().st_size < 40_000, name
    assert {p.stem for p in (DOCS / "gallery").iterdir()} == set(STRATEGIES)
