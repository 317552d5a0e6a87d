"""What a terminal, a log or a notebook shows of a run while it goes on and when it has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from fedsim.compose import Composition
from fedsim.history import History

SHOWN = ("test_accuracy", "test_loss", "distance", "train_loss")


class Progress:
    """A live line on a terminal or under a notebook's cell, a plain line now and then elsewhere, nothing when quiet.

    Args:
        quiet: whether to show nothing; None shows what there is in a notebook alone.
    """

    def __init__(self, quiet: bool | None) -> None:
        self.console = Console()
        self.quiet = not self.console.is_jupyter if quiet is None else quiet
        self._bar: Bar | None = None
        self._cell: _Cell | None = None
        self._seen: dict[str, Any] = {}
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def start(self, composition: Composition, folder: Path | None) -> None:
        """Say what is about to run."""
        if self.quiet:
            return
        plan, rounds = composition.plan, composition.experiment.rounds
        where = f"{folder}: " if folder else ""
        about = f"clients: {plan['clients']}; {plan['engine']}; {plan['workers']}"
        if self.console.is_jupyter:
            self._cell = _Cell(where + about, rounds)
            return
        self.console.print(Text.assemble((where, "bold"), about), soft_wrap=True)
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
        self._seen |= {k: v for k, v in row.items() if k in SHOWN or k.startswith("test_")}
        own = [k for k in self._seen if k not in SHOWN]
        best = [k for k in (*own, *SHOWN) if k in self._seen][:2]  # two fit beside the bar in 80 columns
        shown = "  ".join(f"{k} {self._seen[k]:.4f}" for k in best)
        if self._cell is not None:
            self._cell.show(row["round"], shown)
        elif self._bar is not None:
            self._bar.update(self._task, completed=row["round"], shown=shown)
        elif time.monotonic() - self._last_line > 10 and self._seen.keys() - {"train_loss"}:
            self._last_line = time.monotonic()
            self.console.print(f"round {row['round']}: {shown}", highlight=False, soft_wrap=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._cell is not None:
            self._cell.end()

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


@dataclass
class _Line:
    """What runs and how far it is, as a notebook shows it."""

    about: str
    rounds: int
    round: int = 0
    shown: str = ""

    def __repr__(self) -> str:
        return f"{self.about}\n{self._at}"

    def _repr_html_(self) -> str:
        bar = f'<progress value="{self.round}" max="{self.rounds}"></progress>'
        at = f'<span style="font-variant-numeric:tabular-nums">{escape(self._at)}</span>'
        return f'<div style="opacity:0.7">{escape(self.about)}</div>{bar} {at}'

    @property
    def _at(self) -> str:
        return f"round {self.round}/{self.rounds}  {self.shown}".rstrip()


class _Cell:
    """The lines under a notebook's cell, which are written over four times a second at most.

    IPython's own display does it: rich would need ipywidgets for that, which not every notebook has.
    """

    def __init__(self, about: str, rounds: int) -> None:
        from IPython.display import display

        self.line = _Line(about, rounds)
        self._handle = display(self.line, display_id=True)
        self._next = 0.0

    def show(self, round: int, shown: str) -> None:
        self.line.round, self.line.shown = round, shown
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.25
            self._handle.update(self.line)

    def end(self) -> None:
        self._handle.update(self.line)
