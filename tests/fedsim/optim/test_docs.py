"""The page on optimizers: its examples run, and its table is the table."""

import doctest
from pathlib import Path

from fedsim.optim.table import RULES

PAGE = Path(__file__).parents[3] / "docs" / "optimizers.md"


def rows() -> list[str]:
    """The table's lines, in the table's order."""
    head = [
        "| name | class | source | memory | needs beside a gradient | note |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return head + [
        f"| `{name}` | {e.kind} | {e.paper} | {e.memory} | {', '.join(sorted(e.needs - {'grad'})) or '-'} | {e.note} |"
        for name, e in RULES.items()
    ]


def test_its_examples_run() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 8 and result.failed == 0


def test_it_lists_every_rule_as_the_table_has_it() -> None:
    missing = [row for row in rows() if row not in PAGE.read_text().splitlines()]
    assert not missing, "add to docs/optimizers.md:\n" + "\n".join(missing)
