"""The table of rules as text for a terminal: `fedsim list optimizers`."""

from __future__ import annotations

import textwrap
from itertools import zip_longest

from fedsim.optim.table import RULES, Entry

WIDTHS = {"name": 20, "class": 6, "memory": 25, "needs": 17, "source": 32}  # 100 columns in all
HEAD = """\
class: E elementwise, T a few numbers per tensor, M matrix products, X more than one gradient a step
memory: numbers per parameter, beside the parameter and its gradient
needs: what the task must supply beside a gradient"""


def listing() -> str:
    """Every rule: name, class, memory, needs and source side by side, and its one line below them."""
    rows = [_columns(list(WIDTHS)), ""]
    for name, entry in RULES.items():
        rows += [_columns(_cells(name, entry)), _note(entry.note)]
    return "\n".join([HEAD, "", *rows])


def _cells(name: str, entry: Entry) -> list[str]:
    needs = ", ".join(sorted(entry.needs - {"grad"})) or "-"
    return [name, entry.kind, entry.memory, needs, entry.paper]


def _columns(cells: list[str]) -> str:
    """Cells side by side, long ones folded."""
    widths = list(WIDTHS.values())
    folded = [textwrap.wrap(cell, width - 1) for cell, width in zip(cells, widths, strict=True)]
    lines = zip_longest(*folded, fillvalue="")
    return "\n".join("".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _note(text: str) -> str:
    indent = " " * 4
    return textwrap.fill(text, sum(WIDTHS.values()), initial_indent=indent, subsequent_indent=indent)
