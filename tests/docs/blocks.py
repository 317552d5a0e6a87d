"""The fenced blocks of a Markdown file, and running them in order."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fedsim.console import fedsim

FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        language: python, bash, yaml or text.
        title: the file that it is to be written to, or "".
        text: its lines.
        line: where it begins in its file.
    """

    language: str
    title: str
    text: str
    line: int

    def commands(self) -> list[list[str]]:
        """The lines of a bash block, split as a shell does."""
        return [shlex.split(line, comments=True) for line in self.text.splitlines() if line.strip()]


def blocks(file: Path) -> list[Block]:
    text = file.read_text(encoding="utf-8")
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def play(found: list[Block], folder: Path, source: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write files, call commands and execute Python in the working folder; returns the Python names, old and new."""
    names = {"__name__": "tutorial"} if names is None else names
    for block in found:
        place = f"{source}, line {block.line}"
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, source, "exec"), names)  # errors name the document's lines
        elif block.language == "bash":
            for command in block.commands():
                assert command[0] == "fedsim", f"{place}: only fedsim's commands can be tested, got {command}"
                outcome = fedsim(*command[1:])
                assert outcome.code == 0, f"{place}: {command}: {outcome}"
    return names
