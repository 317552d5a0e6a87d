"""What reproductions by sweep share: the best runs of every method, and claims that are judged seed by seed.

A problem is what methods are compared on; a method may be called by a title of its own (`Wanted`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from fedsim.history import History
from fedsim.metrics import small_is_good
from fedsim.sweep import Results, Sweep, play
from fedsim.sweep.page import write_page
from fedsim.sweep.results import Row
from fedsim.sweep.shown import Shown
from fedsim.sweep.space import Choice

RATE = "local.optimizer.lr"
Found = Mapping[Any, Mapping[str, Sequence[History]]]  # {problem: {method: its best setting's runs, one a seed}}
Read = Callable[[History], float]
Gains = Callable[[Found], list[float]]  # of each seed
RULE = "A gain appears where its mean is above two standard errors of the seeds; below minus two it is reversed."
QUICK = "\n**A quick run, of a budget that shows nothing.**\n"


@dataclass(frozen=True)
class Claim:
    """What the paper leads one to expect: the numbers of each seed should be above zero."""

    text: str
    gains: Gains

    def line(self, found: Found) -> str:
        """Its line in the page's table."""
        gains = self.gains(found)
        return f"| {self.text} | {', '.join(f'{gain:+.4f}' for gain in gains)} | {verdict(gains)} |"


def claims_table(claims: Sequence[Claim], found: Found) -> list[str]:
    """Markdown lines."""
    return ["| claim | gain in each seed | verdict |", "| --- | --- | --- |", *(claim.line(found) for claim in claims)]


def gain(better: str, than: str, problem: Any, read: Read, read_other: Read | None = None) -> Gains:
    """By how much one method is above another in each seed, each by what is read of it; the same unless told."""
    other = read_other or read
    return lambda found: [read(a) - other(b) for a, b in zip(found[problem][better], found[problem][than], strict=True)]


def growth(larger: Gains, smaller: Gains) -> Gains:
    """By how much one gain exceeds another in each seed."""
    return lambda found: [a - b for a, b in zip(larger(found), smaller(found), strict=True)]


def verdict(gains: Sequence[float]) -> str:
    """
    >>> verdict([0.02, 0.03, 0.02]), verdict([0.02, -0.01, 0.0]), verdict([-0.02, -0.03, -0.02])
    ('appears', 'not told apart', 'reversed')
    """
    error = stdev(gains) / len(gains) ** 0.5
    middle = mean(gains)
    return "appears" if middle > 2 * error else "reversed" if middle < -2 * error else "not told apart"


def spread(runs: Sequence[History], read: Read) -> str:
    """Mean ± standard deviation over seeds."""
    values = [read(run) for run in runs]
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def played(plan: Sweep) -> Results:
    """Run what is missing of a sweep, shown on the terminal, and write its page."""
    with Shown(plan.folder) as shown:
        results = play(plan, shown)
    write_page(results)
    return results


def runs_of(row: Row) -> list[History]:
    """One a seed."""
    return [History.load(record.trial.folder) for record in row.records]


@dataclass(frozen=True)
class Wanted:
    """A method of a sweep, and the metric that its rate is chosen by."""

    method: str
    target: str


@dataclass(frozen=True)
class Measured:
    """A method at the rate that was best on the grid's seed, run with other seeds.

    Args:
        edge: whether that rate is the first or the last of the grid.
        runs: one a seed.
        diverged: how many of them ended early; each counts with the last that it reported.
    """

    rate: float
    edge: bool
    runs: list[History]
    diverged: int

    @property
    def rate_text(self) -> str:
        return f"{self.rate:g}{' (end of the grid)' * self.edge}"


@dataclass(frozen=True)
class Searched:
    """A grid on one seed, and what it led to."""

    grid: Results
    measured: dict[str, Measured]

    @property
    def runs(self) -> dict[str, list[History]]:
        return {title: measured.runs for title, measured in self.measured.items()}

    def losses(self, method: str) -> dict[float, float]:
        """{rate: the target at the end of the grid's run}; only of those that came to it."""
        rows = [row for row in self.grid.rows if row.setting.method == method and row.value is not None]
        return {row.setting.values[RATE]: float(row.value) for row in rows if row.value is not None}


def search(plan: Sweep, wanted: Mapping[str, Wanted], seeds: Sequence[int], rate: str = RATE) -> Searched:
    """Choose every method's rate on the plan's own seed, and run the chosen ones with others.

    So that no number is of the run by which its rate was chosen.

    Args:
        plan: a grid of rates for each method of a `per`, on one seed.
        wanted: {title: whose rate to choose}.
        seeds: of the runs that are measured.
        rate: the key of the rate.
    """
    grid = played(replace(plan, folder=plan.folder / "grid"))
    best: dict[str, Row] = {}
    for title, want in wanted.items():
        judged = replace(grid, target=want.target, minimise=plan.minimise or small_is_good(want.target))
        if want.method not in judged.best:
            raise ValueError(f"{grid.folder}: no rate of {title} came to its end; give the grid lower ones")
        best[title] = judged.best[want.method]
    rates = {title: row.setting.values[rate] for title, row in best.items()}
    own = {
        method: {
            **plan.space.own.get(method, {}),
            rate: Choice(tuple(sorted({rates[title] for title in wanted if wanted[title].method == method}))),
        }
        for method in {want.method: None for want in wanted.values()}
    }
    common = {key: value for key, value in plan.space.common.items() if key != rate}
    space = replace(plan.space, common=common, own=own)
    again = played(replace(plan, folder=plan.folder / "best", space=space, seeds=tuple(seeds)))
    measured = {}
    for title, want in wanted.items():
        row = next(
            row for row in again.rows if row.setting.method == want.method and row.setting.values[rate] == rates[title]
        )
        ended = sum(record.ended.status == "diverged" for record in row.records)
        measured[title] = Measured(rates[title], bool(grid.at_the_edge(best[title])), runs_of(row), ended)
    return Searched(grid, measured)
