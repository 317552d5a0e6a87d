"""What `fedsim run` shows while it runs and when it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from fedsim import runs
from fedsim.compose import Composition
from fedsim.fleet import DrivenFleet
from fedsim.history import History
from fedsim.sim.place import follows


def run_shown(
    raw: Mapping[str, Any],
    source: str,
    out: Path | None,
    *,
    name: str,
    resume: bool,
    quiet: bool = False,
    fleet: Callable[[Composition], DrivenFleet] | None = None,
) -> History:
    """Run into a folder, by default the next of `runs/<name>-NNN`, and show how it goes; see `execute`."""
    stem, quiet = Path("runs") / name, quiet or follows()
    folder = out or (runs.last_folder(stem) if resume and not follows() else stem)
    with Progress(quiet) as progress:
        history = runs.execute(
            raw,
            source,
            folder,
            numbered=out is None and not resume,
            resume=resume,
            watch=progress.watch,
            started=progress.start,
            fleet=fleet,
        )
    if history.path is not None:
        progress.summary(history)
    return history


SHOWN = ("test_accuracy", "test_loss", "distance", "train_loss")


class Progress:
    """A live line on a terminal, a plain line now and then elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.console = Console()
        self._bar: Bar | None = None
        self._seen: dict[str, Any] = {}
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def start(self, composition: Composition, folder: Path) -> None:
        """Say what is about to run."""
        if self.quiet:
            return
        plan, rounds = composition.plan, composition.experiment.rounds
        about = f"clients: {plan['clients']}; {plan['engine']}; {plan['workers']}"
        self.console.print(Text.assemble((str(folder), "bold"), f": {about}"), soft_wrap=True)
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task("round", total=rounds, shown="")
            self._bar.start()

    def watch(self, row: Mapping[str, Any]) -> None:
        """Take one row."""
        if self.quiet:
            return
        self._seen |= {k: row[k] for k in SHOWN if k in row}
        best = [k for k in SHOWN if k in self._seen][:2]  # two fit beside the bar in 80 columns
        shown = "  ".join(f"{k} {self._seen[k]:.4f}" for k in best)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["round"], shown=shown)
        elif time.monotonic() - self._last_line > 10 and self._seen.keys() - {"train_loss"}:
            self._last_line = time.monotonic()
            self.console.print(f"round {row['round']}: {shown}", highlight=False, soft_wrap=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def summary(self, history: History) -> None:
        """The result table of a run in a folder, and where its report is."""
        if self.quiet:
            return
        assert history.path is not None
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        for _, label, value in history.headlines():
            table.add_row(label, value)
        self.console.print(table)
        self.console.print(f"report: {history.path / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
