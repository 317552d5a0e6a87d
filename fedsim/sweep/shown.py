"""What `fedsim sweep` shows while it runs and when it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from fedsim.history import show
from fedsim.sweep.drive import Watch
from fedsim.sweep.page import value_text, write_page
from fedsim.sweep.results import Record, Results, Row, value_of
from fedsim.sweep.space import text_of
from fedsim.sweep.trials import Trial

MAX_ROWS = 24  # of the table in the terminal


class Shown(Watch):
    """Bars on a terminal, a line for each trial elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.total, self.done = folder, 0, 0
        self.console = Console()
        self._bars: Progress | None = None
        self._bar_of: dict[Path, Any] = {}

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def plan(self, trials: int, words: str) -> None:
        self.total = trials
        self._print(f"{self.folder}: {trials} trials, {words}")
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=self.console,
                transient=True,
            )
            self._all = self._bars.add_task("trials", total=trials)
            self._bars.start()

    def started(self, trial: Trial) -> None:
        if self._bars is not None:
            rounds = trial.raw.get("rounds", 100)
            self._bar_of[trial.folder] = self._bars.add_task(Text(trial.folder.name).markup, total=rounds)

    def row(self, trial: Trial, round: int) -> None:
        if self._bars is not None:
            self._bars.update(self._bar_of[trial.folder], completed=round)

    def warning(self, text: str) -> None:
        self._print(f"warning: {text}")

    def ended(self, record: Record, target: str | None, before: bool) -> None:
        self.done += 1
        if self._bars is not None:
            self._bars.advance(self._all)
            if (bar := self._bar_of.pop(record.trial.folder, None)) is not None:
                self._bars.remove_task(bar)
            if record.ended.status == "done":
                return
        value = value_of(record, target)
        result = f", {target} {show(target, value)}" if target is not None and value is not None else ""
        why = f": {record.ended.why}" if record.ended.why else ""
        self._print(f"{record.trial.folder}: {record.ended.status}{' before' * before}{result}{why}")

    def stopping(self) -> None:
        self._print("stopping: running trials finish their round and save; Ctrl-C again stops at once")

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def show_results(results: Results) -> None:
    """The table of a sweep, remarks on what was found, and where the page is."""
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    if results.target is not None:
        console.print(_table(results))
    more = len(results.rows) - MAX_ROWS
    if more > 0:
        print(f"{more} more settings are in {results.folder / 'sweep.csv'}")
    for method, row in results.best.items():
        for key in results.at_the_edge(row):
            whose = f"{method}: the" if method else "the"
            print(
                f"{whose} best {key} ({text_of(row.setting.values[key])}) is at the end of what was tried; go on there"
            )
    print(f"report: {write_page(results)}")


def _table(results: Results) -> Table:
    target = results.target
    assert target is not None
    axes = results.keys
    columns = [Column(""), *(Column(key, overflow="fold") for key in axes), Column(target, justify="right")]
    table = Table(*columns, Column("seeds", justify="right"), box=None)
    for row in _shown(results):
        best = results.is_best(row)
        values = [text_of(row.setting.values[key]) if key in row.setting.values else "" for key in axes]
        cells = ["best" if best else "", *values, value_text(row, target), f"{row.num} of {len(row.records)}"]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if best else "")
    return table


def _shown(results: Results) -> list[Row]:
    """Every method's best settings, as many as fit."""
    num_methods = len({row.setting.method for row in results.rows})
    count: dict[str, int] = {}
    found = []
    for row in results.rows:
        count[row.setting.method] = count.get(row.setting.method, 0) + 1
        if count[row.setting.method] <= max(1, MAX_ROWS // num_methods):
            found.append(row)
    return found
