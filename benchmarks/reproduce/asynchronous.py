"""Asynchronous schemes on equal and unequal clocks: loss against virtual time, messages, and spread over clients.

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. arXiv:2206.10189, section 5. One grid of rates for every scheme of a data set. Fashion-MNIST stands
for CIFAR-10, and an MLP on eight characters for the LSTM: that fits two cores.

Letters: M clients, T seconds of virtual time; the loss is the mean over clients of the loss on their own data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.first_results import Figure, panel
from benchmarks.reproduce.claims import (
    QUICK,
    RATE,
    RULE,
    Claim,
    Found,
    Measured,
    Read,
    Searched,
    Wanted,
    claims_table,
    gain,
    search,
    spread,
)
from fedsim.history import History
from fedsim.sweep import Choice, Space, Sweep
from fedsim.sweep.space import text_of

CONFIG = Path("configs/figures/asynchronous.yaml")
M, SECONDS, EARLY = 10, 20, 4.0
PROBE, SEEDS = 0, (1, 2, 3)
TARGET = "client_loss_mean"
SPEAKERS = {
    "task.dataset": {"name": "benchmarks.reproduce.data:loudest_speakers", "count": M, "each": 1000, "test": 1000},
    "partition": {"name": "natural"},
}


@dataclass(frozen=True, eq=False)
class Scheme:
    """A strategy as the page calls it.

    Args:
        interval: seconds between two aggregations; 0: as soon as there are `replies`.
    """

    title: str
    strategy: Mapping[str, Any]
    interval: float = 0.0
    replies: int = 1

    @property
    def method(self) -> str:
        """Its name in a sweep."""
        return text_of(self.strategy)


SYNC = Scheme("synchronous", {"name": "fedavg"}, interval=1.0)
FIX_LONG = Scheme("FedFix 0.5 s", {"name": "fedfix", "interval": 0.5}, interval=0.5)
FIX_SHORT = Scheme("FedFix 0.2 s", {"name": "fedfix", "interval": 0.2}, interval=0.2)
BUFFER = Scheme("FedBuff 3", {"name": "fedbuff", "buffer_size": 3}, replies=3)
ASYNC = Scheme("asynchronous", {"name": "async_fedavg"})
SAME = Scheme("asynchronous, identical weights", {"name": "async_fedavg", "weights": "identical"})


@dataclass(frozen=True, eq=False)
class Data:
    """One data set, the schemes tried on it, and the rates that all of them are tried with."""

    key: str
    title: str
    schemes: tuple[Scheme, ...]
    rates: tuple[float, ...]
    overrides: Mapping[str, Any]


SCHEMES = (SYNC, FIX_LONG, FIX_SHORT, BUFFER, ASYNC)
CLOTHES = Data("fashion", "Fashion-MNIST", (*SCHEMES, SAME), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3), {})
PLAYS = Data("shakespeare", "Shakespeare", SCHEMES, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), SPEAKERS)


@dataclass(frozen=True)
class Problem:
    """A data set on clocks F-x: client i of M takes 1 - x / 100 i / (M - 1) seconds a job."""

    data: Data
    x: int

    @property
    def name(self) -> str:
        return f"{self.data.key}-f{self.x}"

    def __str__(self) -> str:
        return f"{self.data.title}, clocks F-{self.x}"

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """That are run: on equal clocks one that differs from what it is on unequal ones."""
        return self.data.schemes if self.x else (ASYNC,)

    def per_second(self, scheme: Scheme) -> float:
        """Aggregations a second, in the long run."""
        if scheme.interval:
            return 1 / scheme.interval
        return sum(1 / (1 - self.x / 100 * i / (M - 1)) for i in range(M)) / scheme.replies

    def sweep(self, folder: Path, quick: bool) -> Sweep:
        """The grid: every scheme, every rate, one seed."""
        seconds = 3 if quick else SECONDS
        common = {
            **self.data.overrides,
            "strategy": Choice(tuple(dict(scheme.strategy) for scheme in self.schemes)),
            RATE: Choice(self.data.rates[:2] if quick else self.data.rates),
            "clients.devices.x": self.x,
            "stop.virtual_seconds": seconds,
        }
        own = {
            scheme.method: {
                "rounds": ceil(self.per_second(scheme) * seconds) + M,  # some more than until the time is over
                "evaluate.every": round(self.per_second(scheme)),
            }
            for scheme in self.schemes
        }
        space = Space(common, own, per="strategy")
        return Sweep(config=CONFIG, space=space, folder=folder / self.name, seeds=(PROBE,), target=TARGET)

    def search(self, folder: Path, quick: bool) -> Searched:
        wanted = {scheme.title: Wanted(scheme.method, TARGET) for scheme in self.schemes}
        return search(self.sweep(folder, quick), wanted, SEEDS[:2] if quick else SEEDS)


PROBLEMS = [Problem(data, x) for data in (CLOTHES, PLAYS) for x in (80, 0)]


def loss(run: History) -> float:
    return float(run.last(TARGET))


def low_loss(run: History) -> float:
    return -loss(run)


def early_loss(run: History) -> float:
    """After EARLY seconds of virtual time, on a line between the evaluations around it."""
    return float(np.interp(EARLY, *run.pairs("virtual_seconds", TARGET)))


def low_early_loss(run: History) -> float:
    return -early_loss(run)


def roughness(run: History) -> float:
    """How far the loss at an evaluation is from the line between its neighbours', over the second half of the time."""
    values = run.series(TARGET)[1]
    late = values[len(values) // 2 :]
    return float(np.abs(late[1:-1] - (late[:-2] + late[2:]) / 2).mean())


def smoothness(run: History) -> float:
    return -roughness(run)


def replies(run: History) -> float:
    return float(sum(row.get("num_clients", 0) for row in run.rows))


def claims(data: Data) -> list[Claim]:
    """What section 5 of the paper leads one to expect of one data set."""
    unequal, equal = Problem(data, 80), Problem(data, 0)

    def claim(text: str, problem: Problem, better: Scheme, than: Scheme, read: Read) -> Claim:
        return Claim(text, gain(better.title, than.title, problem, read))

    early = f"after {EARLY:g} s"
    known = [
        claim("(i) F-80: unbiased weights end at less loss than identical", unequal, ASYNC, SAME, low_loss),
        claim(f"(ii) F-80: asynchronous ahead of synchronous {early}", unequal, ASYNC, SYNC, low_early_loss),
        claim(f"(ii) F-80: FedFix 0.5 s ahead of synchronous {early}", unequal, FIX_LONG, SYNC, low_early_loss),
        claim("(ii) F-80: FedFix 0.5 s ends at less loss than synchronous", unequal, FIX_LONG, SYNC, low_loss),
        claim("(ii) F-80: FedFix 0.5 s ends at less loss than asynchronous", unequal, FIX_LONG, ASYNC, low_loss),
        claim("(ii) F-80: FedFix 0.5 s smoother than asynchronous", unequal, FIX_LONG, ASYNC, smoothness),
        claim("(ii) F-80: synchronous smoother than FedFix 0.5 s", unequal, SYNC, FIX_LONG, smoothness),
        claim(f"(iv) F-0: asynchronous not ahead of synchronous {early}", equal, SYNC, ASYNC, low_early_loss),
        claim("(iv) F-0: nor at the end", equal, SYNC, ASYNC, low_loss),
    ]
    return known if SAME in data.schemes else known[1:]


def reproduce(runs: Path, figures: Path, quick: bool) -> str:
    """Run what is missing, draw, and give the page's text."""
    searched = {problem: problem.search(runs, quick) for problem in PROBLEMS}
    found = everywhere({problem: result.runs for problem, result in searched.items()})
    for data in (CLOTHES, PLAYS):
        draw(data, found, figures / f"asynchronous-{data.key}.png")
    return page(searched, found, quick)


def everywhere(found: Found) -> dict[Problem, dict[str, Sequence[History]]]:
    """With synchronous runs on equal clocks: where all wait for the slowest, it is all that matters."""
    whole = {problem: dict(runs) for problem, runs in found.items()}
    for problem, runs in whole.items():
        if not problem.x:
            whole[problem] = {SYNC.title: whole[Problem(problem.data, 80)][SYNC.title], **runs}
    return whole


def draw(data: Data, found: Found, path: Path) -> None:
    """Loss over time on both clocks, and over what clients sent on the unequal ones."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(12.0, 4.2), layout="constrained")
    unequal, equal = Problem(data, 80), Problem(data, 0)
    colours = dict(zip(found[unequal], rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    over_time, over_bits, even = canvas.subplots(1, 3, sharey=True)
    for ax, problem, x in (
        (over_time, unequal, "virtual_seconds"),
        (even, equal, "virtual_seconds"),
        (over_bits, unequal, "bits_up"),
    ):
        figure = Figure(title=str(problem), x=x, y=TARGET, variants={}, log=True)
        panel(ax, figure, found[problem], [colours[title] for title in found[problem]])
        ax.set_ylabel("mean loss of clients (nats)" if ax is over_time else "")
        ax.get_legend().remove()
    canvas.legend(*over_time.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(colours))
    canvas.savefig(path, dpi=100)


INTRO = """# Asynchronous schemes on equal and unequal clocks

Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
Clients Updates. [arXiv:2206.10189](https://arxiv.org/abs/2206.10189), section 5.

`make reproduce NAME=asynchronous{option}`, made by `benchmarks/reproduce/asynchronous.py`: every number below is of
that run. On clocks F-80 the slowest client takes a second a job and the fastest 0.2 s, evenly spaced; on F-0 all take
a second. {clients} clients, {seconds} s of virtual time, jobs of ten steps of 20 samples, all clients at work at all
times, each as important as any other. The loss is the mean over clients of the loss on their own training data.

- *Fashion-MNIST*: the first {images:,} images, client-wise Dirichlet 0.1, MLP 784-50-10.
- *Shakespeare*: the {clients} speakers who say most, a client each, 1,000 samples a client, evenly spread over all that
  it says; the next character from the eight before, MLP 520-50-65.

Every scheme is tried with the same rates **on one seed** ({probe}). The rate with the least loss at the end is run with
the seeds {seeds}, of which all other numbers are: mean ± standard deviation. The paper has CIFAR-10 and an LSTM on
Shakespeare, 20 or 50 clients, 5,000 s of virtual time, finer rates and one seed.
{quick}
## What was to appear, and what did

{claims}
{rule}

Ahead after {early:g} s means less loss then, each at its own best rate. Smoother means that the loss at an evaluation
(one a second) is nearer to the line between its neighbours, over the second half of the time: *roughness* in the
tables. *Worst tenth* is the mean loss of the tenth of clients that lose most. On F-0 synchronous FedAvg is what it is
on F-80, a second a round; FedFix is the same with a step 1 / interval times as long; identical and unbiased weights
are the same numbers. FedBuff was not run there.

Why the asynchronous scheme is not ahead where it was to be: one client's change, of data unlike the others', is a
whole step of the server, and an unbiased step is the larger the rarer its client replies. So it bears only the small
rates of (iii), at which a model does not get far in {early:g} s. In the tables it sends most for what it reaches.
FedFix with half of the slowest client's time as its window bears the rate of the synchronous scheme, and is ahead of
it then and at the end.
"""


def page(searched: Mapping[Problem, Searched], found: Found, quick: bool) -> str:
    """The page's text."""
    some = searched[PROBLEMS[0]]
    judged: list[str] = []
    for data in (CLOTHES, PLAYS):
        judged += [f"### {data.title}", "", *claims_table(claims(data), found), ""]
        judged += [stability(searched[Problem(data, 80)]), ""]
    intro = INTRO.format(
        option=" QUICK=1" * quick,
        clients=M,
        seconds=some.grid.records[0].trial.raw["stop"]["virtual_seconds"],
        images=600 * M,
        probe=PROBE,
        seeds=", ".join(map(str, SEEDS[: len(found[PROBLEMS[0]][SYNC.title])])),
        quick=QUICK * quick,
        claims="\n".join(judged),
        rule=RULE,
        early=EARLY,
    )
    lines = [intro]
    for data in (CLOTHES, PLAYS):
        lines += [f"## {data.title}", "", f"![Loss over time](figures/asynchronous-{data.key}.png)", ""]
        lines += ["Lines are means, bands span the seeds.", ""]
        for problem in (Problem(data, 80), Problem(data, 0)):
            lines += tables(problem, searched[problem])
    return "\n".join(lines)


def stability(result: Searched) -> str:
    """Claim (iii), on the grid: the larger the rate, the sooner schemes of many aggregations fail."""
    order = (ASYNC, FIX_SHORT, FIX_LONG, SYNC)
    largest = [largest_rate(result.losses(scheme.method)) for scheme in order]
    said = ", ".join(f"{scheme.title} {rate:g}" for scheme, rate in zip(order, largest, strict=True))
    holds = all(a <= b for a, b in pairwise(largest)) and largest[0] < largest[-1]
    return (
        "(iii) F-80, seed 0: the largest rate that ends at most a quarter above the scheme's least loss: "
        f"{said}. The order asynchronous, FedFix 0.2 s, FedFix 0.5 s, synchronous "
        f"{'appears' if holds else 'does not appear'}."
    )


def largest_rate(losses: Mapping[float, float]) -> float:
    """
    >>> largest_rate({0.1: 1.0, 0.3: 1.2, 1.0: 2.0})
    0.3
    """
    return max(rate for rate, loss in losses.items() if loss <= 1.25 * min(losses.values()))


def tables(problem: Problem, result: Searched) -> list[str]:
    """Of one problem: measured schemes, and the grid."""
    head = "scheme | rate | loss | at 4 s | roughness | deviation over clients | worst tenth | replies | sent (Mbit)"
    lines = [f"### Clocks F-{problem.x}", "", f"| {head} |", "| --- " * 9 + "|"]
    for title, measured in result.measured.items():
        lines.append(f"| {title} | {measured.rate_text} | {' | '.join(cells(measured))} |")
    rates = problem.data.rates
    lines += ["", "Loss at the end, on the grid's seed, by rate (-: diverged):", ""]
    lines += [f"| scheme | {' | '.join(f'{rate:g}' for rate in rates)} |", "| --- " * (len(rates) + 1) + "|"]
    for scheme in problem.schemes:
        losses = result.losses(scheme.method)
        shown = (f"{losses[rate]:.3f}" if rate in losses else "-" for rate in rates)
        lines.append(f"| {scheme.title} | {' | '.join(shown)} |")
    diverged = sum(measured.diverged for measured in result.measured.values())
    num = len(result.grid.records) + sum(len(measured.runs) for measured in result.measured.values())
    return [*lines, "", f"{num} runs; {diverged} of the measured ones diverged.", ""]


def cells(measured: Measured) -> list[str]:
    """Of its line: losses and spread over clients, and what was sent, the same for every seed."""
    runs = measured.runs
    reads = (loss, early_loss, roughness, lambda run: run.last("client_loss_std"))
    worst = spread(runs, lambda run: float(run.last("client_loss_worst_decile")))
    sent = f"{np.mean([run.last('bits_up') for run in runs]) / 1e6:,.0f}"
    return [*(spread(runs, read) for read in reads), worst, f"{np.mean([replies(run) for run in runs]):,.0f}", sent]
