"""The live line, the plain lines, and the table at the end."""

from __future__ import annotations

import io
from pathlib import Path

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
