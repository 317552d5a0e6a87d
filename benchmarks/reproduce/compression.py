"""Compressed methods side by side: accuracy against what clients send, on digits under Dirichlet 0.1.

Descent methods take one gradient of all of a client's data a round; FedAvg's clients take five local steps. Every
method is tried with the same rates on one seed, and its best one run with three others.

Letters: a budget is so many megabits of one client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.reproduce.claims import (
    QUICK,
    RATE,
    RULE,
    Claim,
    Found,
    Measured,
    Read,
    Wanted,
    claims_table,
    gain,
    search,
    spread,
)
from fedsim.history import History
from fedsim.sweep import Choice, Space, Sweep
from fedsim.sweep.space import text_of

CONFIG = Path("configs/figures/compression.yaml")
CLIENTS, ROUNDS, PROBE, SEEDS = 10, 150, 0, (1, 2, 3)
RATES, ZEROTH_RATES = (0.03, 0.1, 0.3, 1.0), (3e-4, 1e-3, 3e-3)
ACCURACY, PROBLEM = "test_accuracy", "digits"
GOALS = (0.8, 0.9, 0.95)
BUDGET, SHORT = 1.21, 0.017  # five rounds of whole vectors, and of Top-1%
RAND, TOP = {"name": "rand_k", "fraction": 0.05}, {"name": "top_k", "fraction": 0.01}
WARM, COLD = ({"name": "powersgd", "rank": 1, "warm_start": warm} for warm in (True, False))
Measures = Mapping[str, Measured]


@dataclass(frozen=True, eq=False)
class Group:
    """Methods that differ in one key.

    Args:
        name: of its folder.
        key: that tells them apart.
        methods: {title: its value}.
        rates: that all of them are tried with.
        overrides: of all of them.
    """

    name: str
    key: str
    methods: Mapping[str, Mapping[str, Any]]
    rates: tuple[float, ...] = RATES
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def sweep(self, folder: Path, quick: bool) -> Sweep:
        """The grid: every method, every rate, one seed."""
        common = {
            self.key: Choice(tuple(self.methods.values())),
            RATE: Choice(self.rates[:2] if quick else self.rates),
            "rounds": ROUNDS,
            **self.overrides,
            **({"rounds": 10} if quick else {}),
        }
        space, own = Space(common, per=self.key), folder / self.name
        # runs of seconds, which are not worth a process each
        return Sweep(config=CONFIG, space=space, folder=own, seeds=(PROBE,), target=ACCURACY, jobs=1)

    def search(self, folder: Path, quick: bool) -> Measures:
        wanted = {title: Wanted(text_of(value), ACCURACY) for title, value in self.methods.items()}
        return search(self.sweep(folder, quick), wanted, SEEDS[:2] if quick else SEEDS).measured


def fed_back(compressor: Mapping[str, Any]) -> dict[str, Any]:
    """An uplink with error feedback."""
    return {"compressor": compressor, "error_feedback": True}


WHOLE = {"compressor": {"name": "identity"}}
GRADIENTS = {"local.steps": 1, "local.batch_size": "full", "clients.devices.seconds_per_step": 0.05}
GROUPS = (
    Group(
        "gradients",
        "uplink",
        {"GD": WHOLE, "DCGD, Rand-5%": {"compressor": RAND}, "EF14, Top-1%": fed_back(TOP)},
        overrides=GRADIENTS,
    ),
    Group(
        "differences",
        "strategy",
        {
            "EF21, Top-1%": {"name": "ef21", "compressor": TOP},
            "EF21-BC, Top-1%": {"name": "ef21_bc", "compressor": TOP, "server_compressor": TOP},
            "DIANA, Rand-5%": {"name": "diana", "compressor": RAND},
            "MARINA, Rand-5%": {"name": "marina", "compressor": RAND},
        },
        overrides=GRADIENTS,
    ),
    Group(
        "local-steps",
        "uplink",
        {
            "FedAvg": WHOLE,
            "FedAvg, QSGD": {"compressor": {"name": "qsgd", "levels": 4}},
            "FedAvg, natural": {"compressor": {"name": "natural"}},
            "FedAvg, Top-1%": fed_back(TOP),
            "FedAvg, PowerSGD": fed_back(WARM),
            "FedAvg, PowerSGD cold": fed_back(COLD),
        },
    ),
    Group(
        "seeds",
        "uplink",
        {"FedAvg of MeZO, seeds": {"compressor": {"name": "seeds", "steps": 5}}},
        rates=ZEROTH_RATES,
        overrides={"local.optimizer.name": "mezo", "rounds": ROUNDS // 2},
    ),
)


def accuracy(run: History) -> float:
    return float(run.last(ACCURACY))


def curve(run: History, key: str = "bits_up") -> tuple[np.ndarray, np.ndarray]:
    """(megabits of a client, or values of another key; accuracies) at every evaluation."""
    x, y = run.pairs(key, ACCURACY)
    return (x / CLIENTS / 1e6 if key.startswith("bits") else x), y


def within(budget: float) -> Read:
    """The accuracy at the last evaluation for which a client had sent no more; 0 where even the first took more."""

    def read(run: History) -> float:
        sent, reached = curve(run)
        before = reached[sent <= budget]
        return float(before[-1]) if len(before) else 0.0

    return read


def megabits_to(goal: float, run: History) -> float | None:
    """What a client had sent at the first evaluation that reached the goal; None where none did."""
    sent, reached = curve(run)
    there = np.flatnonzero(reached >= goal)
    return float(sent[there[0]]) if len(there) else None


def claims() -> list[Claim]:
    """What the papers lead one to expect."""

    def ahead(better: str, than: str, read: Read, text: str) -> Claim:
        return Claim(f"{better} above {than} {text}", gain(better, than, PROBLEM, read))

    budget, end = f"at {BUDGET:g} Mbit", "at the end"
    close = gain("FedAvg, natural", "FedAvg", PROBLEM, accuracy, lambda run: accuracy(run) - 0.01)
    both = gain("EF21-BC, Top-1%", "EF21, Top-1%", PROBLEM, accuracy, lambda run: accuracy(run) - 0.02)
    return [
        ahead("EF14, Top-1%", "GD", within(BUDGET), budget),
        ahead("EF14, Top-1%", "DCGD, Rand-5%", within(BUDGET), budget),
        ahead("EF21, Top-1%", "EF14, Top-1%", accuracy, end),
        ahead("DIANA, Rand-5%", "DCGD, Rand-5%", accuracy, end),
        ahead("MARINA, Rand-5%", "DIANA, Rand-5%", within(BUDGET), budget),
        Claim("EF21-BC is at most two points below EF21 at the end", both),
        ahead("FedAvg, Top-1%", "FedAvg", within(BUDGET), budget),
        ahead("FedAvg, Top-1%", "EF14, Top-1%", within(BUDGET), budget),
        ahead("FedAvg, PowerSGD", "FedAvg, PowerSGD cold", accuracy, end),
        ahead("FedAvg, PowerSGD", "FedAvg, Top-1%", within(BUDGET), budget),
        Claim("FedAvg, natural is at most a point below FedAvg at the end", close),
        ahead("FedAvg of MeZO, seeds", "FedAvg, Top-1%", within(SHORT), f"at {SHORT:g} Mbit"),
    ]


def reproduce(runs: Path, figures: Path, quick: bool) -> str:
    """Run what is missing, draw, and give the page's text."""
    measured = {title: m for group in GROUPS for title, m in group.search(runs, quick).items()}
    draw({title: m.runs for title, m in measured.items()}, figures / "compression.png")
    return page(measured, quick)


def draw(found: Mapping[str, Sequence[History]], path: Path) -> None:
    """Accuracy over what a client sent and over virtual time: means of the seeds."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(12.0, 5.0), layout="constrained")
    panels = canvas.subplots(1, 2, sharey=True)
    for ax, key, label in (
        (panels[0], "bits_up", "sent by a client (Mbit)"),
        (panels[1], "virtual_seconds", "virtual time (s)"),
    ):
        for k, (title, runs) in enumerate(found.items()):
            curves = [curve(run, key) for run in runs]
            grid = np.geomspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 100)
            middle = np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)
            style = "--" if title.startswith("FedAvg") else "-"
            ax.plot(grid, middle, style, color=f"C{k % 10}", linewidth=1.2, label=title)
        ax.set(xscale="log", xlabel=label, ylabel="test accuracy" if key == "bits_up" else "")
        ax.spines[["top", "right"]].set_visible(False)
    canvas.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    canvas.savefig(path, dpi=100)


INTRO = """# Compressed methods: accuracy for what is sent

DCGD and DIANA: Mishchenko, Gorbunov, Takac, Richtarik, arXiv:1901.09269. EF14: Seide et al. 2014. EF21 and EF21-BC:
arXiv:2106.05203, arXiv:2110.03294. MARINA: arXiv:2102.07845. QSGD: arXiv:1610.02132. Natural compression:
arXiv:1905.10988. PowerSGD: arXiv:1905.13727. MeZO: arXiv:2305.17333.

`make reproduce NAME=compression{option}`, made by `benchmarks/reproduce/compression.py`: every number below is of that
run. {clients} clients share the digits of scikit-learn by Dirichlet 0.1, and all of them take part in
every round. MLP 64-100-10: a whole vector of {size:,} numbers is {whole:.2f} Mbit. {rounds} rounds, and half as many
for MeZO.

- *Descent methods* (GD to MARINA): a round is one gradient of all of a client's data, and one step of the server.
- *FedAvg*: five local steps of batch 32. Top-1% and PowerSGD (rank 1) with error feedback. Cold means that PowerSGD
  begins every message at random, else it begins where the client's last one ended.

Bits are those that one client sends, indices, norms and whole renewals included. Time is virtual: an uplink of 0.1
Mbit/s, 0.01 s a local step and 0.05 s a gradient of all data; what is received takes none.

Every method is tried with the rates {rates} **on one seed** ({probe}), MeZO with {zeroth}.
The rate that is most accurate at the end is run with the seeds {seeds}, of which all numbers are: mean ± standard
deviation.
{quick}
![Accuracy over bits and time](figures/compression.png)

Lines are means of the seeds; FedAvg is dashed.

## What was to appear, and what did

{claims}

Gains are in accuracy. {rule}
At a budget counts the last evaluation, every five rounds, for which no more had been sent: {budget:g} Mbit are five
rounds of whole vectors, and {short:g} five of Top-1%.

What to make of it. The problem is small and all but solved in the end by most methods, so that they differ in what they
send on the way, by two orders of magnitude, and little in where they end. Rates are chosen by the end: whole vectors at
the rate that is best after all rounds get nowhere in five, where a lower one would do better, so that the gains over
them at a budget are larger than they need be; the table, which has no budget, says by how much less is sent. Many best
rates are the end of the grid. At such a rate EF21 jumps, and one seed ends in a jump. MARINA pays for its whole
gradients, of which the first is one. A warm start of PowerSGD is a small gain here. MeZO sends next to nothing and has
hardly begun to learn after its rounds. Larger images and models were not run.

## What it takes
"""


def page(measured: Measures, quick: bool) -> str:
    """The page's text."""
    some = measured["GD"].runs
    found: Found = {PROBLEM: {title: m.runs for title, m in measured.items()}}
    whole = some[0].last("bits_up") / CLIENTS / some[0].last("round")
    intro = INTRO.format(
        option=" QUICK=1" * quick,
        clients=CLIENTS,
        size=round(whole / 32),
        whole=whole / 1e6,
        rounds=some[0].last("round"),
        rates=", ".join(f"{rate:g}" for rate in RATES),
        zeroth=", ".join(f"{rate:g}" for rate in ZEROTH_RATES),
        probe=PROBE,
        seeds=", ".join(map(str, SEEDS[: len(some)])),
        quick=QUICK * quick,
        claims="\n".join(claims_table(claims(), found)),
        rule=RULE,
        budget=BUDGET,
        short=SHORT,
    )
    head = "method | rate | accuracy at the end | Mbit up in all | Mbit down in all | "
    head += " | ".join(f"Mbit up to {100 * goal:g} %" for goal in GOALS)
    lines = [intro, f"| {head} |", "| --- " * (5 + len(GOALS)) + "|"]
    lines += [f"| {title} | {' | '.join(cells(m))} |" for title, m in measured.items()]
    note = "In brackets: how many seeds got there, where not all did; the mean is of those."
    diverged = sum(m.diverged for m in measured.values())
    ended = f"{diverged} of the measured runs diverged." if diverged else "No measured run diverged."
    return "\n".join([*lines, "", note, ended, ""])


def cells(m: Measured) -> list[str]:
    """Of a method's line in the table."""
    up, down = (mean(run.last(key) for run in m.runs) / CLIENTS / 1e6 for key in ("bits_up", "bits_down"))
    return [m.rate_text, spread(m.runs, accuracy), f"{up:.3g}", f"{down:.3g}", *(to(goal, m.runs) for goal in GOALS)]


def to(goal: float, runs: Sequence[History]) -> str:
    """Mean megabits to a goal, over the runs that reached it."""
    there = [sent for run in runs if (sent := megabits_to(goal, run)) is not None]
    if not there:
        return "never"
    return f"{mean(there):.3g}" + f" ({len(there)} of {len(runs)})" * (len(there) < len(runs))
