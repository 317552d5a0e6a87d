"""The README: its commands exist, its example runs, its links lead somewhere, its tables name what ships."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from omegaconf import OmegaConf

import fedsim
from fedsim import cli
from fedsim.compose import compose
from tests.docs.blocks import blocks
from tests.fedsim.console import fedsim as console

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")


def commands() -> list[list[str]]:
    shown = [b for b in blocks(README) if b.language == "bash"]
    return [c for b in shown for c in b.commands() if c[0] == "fedsim"]


def test_the_example_runs() -> None:
    (example,) = [b.text for b in blocks(README) if b.language == "yaml"]
    raw: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(example))  # type: ignore[assignment]
    history = fedsim.run(raw, rounds=2, **{"evaluate.every": 1})
    assert len(history) == 2 and history.last("test_accuracy") > 0
    assert len(example.strip().splitlines()) <= 10


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_options_and_keys_that_exist(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options = {name for p in known[command[1]].params for name in p.opts}
    assert {a for a in command if a.startswith("-")} <= options
    if command[1] in ("run", "check", "tune"):
        keys = [a for a in command[3:] if "=" in a]
        found = console("check", command[2], *keys)
        assert found.code == 0, found
    if command[1] == "list":
        assert console(*command[1:]).code == 0


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", README.read_text()):
        if target not in ("without",):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_way_without_make_installs_what_the_makefile_does() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = README.read_text()
    assert "'.[test,flower]'" in text and {"test", "flower"} <= set(project["optional-dependencies"])
    assert project["scripts"] == {"fedsim": "fedsim.cli:main"}
    for tool in ("ruff format --check .", "ruff check .", "mypy", "lint-imports", "pytest"):
        assert f".venv/bin/{tool}" in text


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda p: p.name)
def test_links_lead_to_files_of_this_repository(page: Path) -> None:
    # those of the pages in docs/ are looked at by `make docs`, which makes some of the pages that they lead to
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_table_is_named() -> None:
    text = README.read_text().lower()
    for kind in ("strategies", "optimizers", "compressors", "aggregation", "attacks", "devices", "data", "engines"):
        assert kind in text
    for configuration in re.findall(r"configs/\w+\.yaml", text):
        compose(OmegaConf.to_container(OmegaConf.load(ROOT / configuration)), configuration).close()  # type: ignore[arg-type]
