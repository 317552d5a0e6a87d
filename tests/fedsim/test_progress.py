"""The live line, the plain lines, and the table at the end."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from fedsim import progress
from fedsim.compose import Composition, compose
from fedsim.history import History
from fedsim.progress import Progress


@pytest.fixture(scope="module")
def composition() -> Composition:
    made = compose({"task": "quadratic", "rounds": 100}, "x")
    made.close()
    return made


ROW = {"round": 17, "train_loss": 1.5, "test_accuracy": 0.53204, "test_loss": 1.40251, "wall_seconds": 3.0}


def on_console(terminal: bool, quiet: bool = False) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    shown = Progress(quiet)
    shown.console = Console(file=out, force_terminal=terminal, width=80)
    return shown, out


def test_the_live_line_shows_rounds_and_results_in_80_columns(composition: Composition) -> None:
    shown, out = on_console(terminal=True)
    with shown:
        shown.start(composition, Path("runs/a[1]"))
        shown.watch(ROW)
    text = out.getvalue()
    assert "runs/a[1]" in text and "100 of them in a round" in text
    assert "round 17/100" in text and "test_accuracy 0.5320  test_loss 1.4025" in text and "…" not in text


def test_without_a_terminal_there_is_a_plain_line_now_and_then(
    composition: Composition, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 100.0, 105.0, 115.0, 115.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown, out = on_console(terminal=False)
    with shown:
        shown.start(composition, Path("runs/a"))
        for number in (17, 18, 19):
            shown.watch({**ROW, "round": number})
    lines = out.getvalue().splitlines()[1:]
    assert lines == [f"round {n}: test_accuracy 0.5320  test_loss 1.4025" for n in (17, 19)]


class Display:
    """What IPython's display does, on record."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        module = ModuleType("IPython.display")
        module.display = self  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def __call__(self, line: Any, display_id: bool) -> Display:
        assert display_id
        self.update(line)
        return self

    def update(self, line: Any) -> None:
        self.lines.append(line._repr_html_())


def test_a_notebook_has_one_line_that_is_written_over_now_and_then(
    composition: Composition, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 10.0, 10.1, 10.2, 10.3, 10.3])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    display = Display(monkeypatch)
    monkeypatch.setattr(progress, "Console", lambda: Console(file=io.StringIO(), force_jupyter=True))
    with Progress(None) as shown:
        assert not shown.quiet
        shown.start(composition, Path("runs/<a>"))
        for number in range(1, 6):
            if number == 5:
                clock = iter([10.4])
            shown.watch({**ROW, "round": number})
    bars = [line.partition("</div>")[2].partition("</progress>")[0] for line in display.lines]
    assert bars == [f'<progress value="{n}" max="100">' for n in (0, 1, 4, 5)]
    assert "round 5/100  test_accuracy 0.5320  test_loss 1.4025" in display.lines[-1]
    assert all("runs/&lt;a&gt;: clients: " in line for line in display.lines)


def test_outside_of_a_notebook_python_is_quiet_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Progress(None).quiet and not Progress(False).quiet


def test_quiet_is_silent(composition: Composition) -> None:
    shown, out = on_console(terminal=True, quiet=True)
    with shown:
        shown.start(composition, Path("runs/a"))
        shown.watch(ROW)
    shown.summary(History([ROW]))
    assert out.getvalue() == ""


def test_the_table_gives_values_with_units_and_the_report(composition: Composition) -> None:
    shown, out = on_console(terminal=False)
    shown.summary(History([{**ROW, "bits_up": 192_128_000, "virtual_seconds": 5.25}], {}, Path("runs/a[1]")))
    text = out.getvalue()
    for part in ("53.2 %", "1.4", "192 Mbit", "5.25 s", "report: runs/a[1]/report.html"):
        assert part in text
