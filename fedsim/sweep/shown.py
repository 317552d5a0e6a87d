"""What `fedsim sweep` shows while it runs and when it has ended, and the page that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from fedsim.history import show
from fedsim.report.sweep import SettingLine, SweepPage
from fedsim.sweep.drive import Watch
from fedsim.sweep.results import Record, Results, Row, value_of
from fedsim.sweep.space import text_of
from fedsim.sweep.trials import Trial

MAX_ROWS = 24  # of the table in the terminal
REPORT_FILE = "report.html"


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


def write_page(results: Results) -> Path:
    """Write the sweep's page into its folder."""
    lines = [
        SettingLine(
            name=row.setting.name or "the file's settings",
            method=row.setting.method,
            values=row.setting.values,
            folders=[r.trial.folder for r in row.records if r.ended.status == "done"],
            value=row.value,
            deviation=row.deviation,
            worst=row.worst if row.whole else None,
            best=results.best.get(row.setting.method) is row,
        )
        for row in results.rows
    ]
    troubled = [(r.trial.folder.name, r.ended.status, r.ended.why) for r in results.troubled]
    page = SweepPage(
        title=results.folder.resolve().name,
        lines=lines,
        axes=results.listed,
        troubled=troubled,
        target=results.target,
        minimise=results.minimise,
    )
    return page.write(results.folder / REPORT_FILE)


def _table(results: Results) -> Table:
    target = results.target
    assert target is not None
    axes = list(dict.fromkeys(key for row in results.rows for key in row.setting.values))
    columns = [Column(""), *(Column(key, overflow="fold") for key in axes), Column(target, justify="right")]
    table = Table(*columns, Column("seeds", justify="right"), box=None)
    for row in _shown(results):
        best = results.best.get(row.setting.method) is row
        values = [text_of(row.setting.values[key]) if key in row.setting.values else "" for key in axes]
        cells = ["best" if best else "", *values, _result(row, target), f"{row.num} of {len(row.records)}"]
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


def _result(row: Row, target: str) -> str:
    if row.value is None:
        return "–"
    return show(target, row.value) + (f" ± {show(target, row.deviation)}" if row.deviation is not None else "")
