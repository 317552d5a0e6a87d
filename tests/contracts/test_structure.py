"""The house stays readable: short files, short functions, no import circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE, MAX_FUNCTION = 400, 60  # lines


def sources() -> Iterator[Path]:
    for folder in ("fedsim", "strategies", "clients"):
        yield from (p for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sorted(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_few_screens(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{path}:{node.lineno} {node.name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = grimp.build_graph("fedsim", cache_dir=None)
    graph = networkx.DiGraph((a, b) for a in found.modules for b in found.find_modules_directly_imported_by(a))
    circles = [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]
    assert not circles
