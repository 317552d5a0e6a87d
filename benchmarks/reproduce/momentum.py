"""Momentum in local steps under label skew: the orderings of Cheng, Huang, Wu, Yuan, arXiv:2306.16504.

One grid of rates for every method on one seed, and the rate of each with the highest final accuracy run with three
others. What the paper's models, data and K were is not copied (CIFAR-10, ResNet-18): an MLP on Fashion-MNIST fits two
cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.first_results import Figure, draw
from benchmarks.reproduce.claims import (
    QUICK,
    RATE,
    RULE,
    Claim,
    Found,
    Searched,
    Wanted,
    claims_table,
    gain,
    growth,
    runs_of,
    search,
    spread,
)
from fedsim.history import History
from fedsim.sweep import Sweep, parse_space

CONFIG = Path("configs/figures/momentum.yaml")
NAMES = {
    "fedavg": "FedAvg",
    "fedavg_m": "FedAvg-M",
    "fedavg_m_vr": "FedAvg-M-VR",
    "scaffold": "SCAFFOLD",
    "scaffold_m": "SCAFFOLD-M",
    "scaffold_m_vr": "SCAFFOLD-M-VR",
}
BETA = 0.2
RATES = (0.005, 0.02, 0.1, 0.2, 0.4, 0.8)
ROUNDS, PROBE, SEEDS = 100, 0, (1, 2, 3)
TARGET = "test_accuracy"


@dataclass(frozen=True)
class Problem:
    """So many clients, ten of them in a round, with such a skew."""

    clients: int
    alpha: float

    @property
    def name(self) -> str:
        return f"n{self.clients}-alpha{self.alpha:g}"

    def __str__(self) -> str:
        who = "all of 10 clients" if self.clients == 10 else f"10 of {self.clients} clients in a round"
        return f"{who}, Dirichlet {self.alpha:g}"

    def sweep(self, folder: Path, quick: bool) -> Sweep:
        texts = [
            f"strategy.name={','.join(NAMES)}",
            f"fedavg_m,fedavg_m_vr,scaffold_m,scaffold_m_vr:strategy.beta={BETA}",
            f"local.optimizer.lr={','.join(map(str, RATES[1:3] if quick else RATES))}",
            f"clients.count={self.clients}",
            f"partition.alpha={self.alpha}",
            "strategy.cohort_size=10",
            f"rounds={4 if quick else ROUNDS}",
            f"evaluate.every={1 if quick else 5}",
        ]
        return Sweep(
            config=CONFIG,
            space=parse_space(texts, "strategy.name", str(CONFIG)),
            folder=folder / self.name,
            seeds=(PROBE,),
            target=TARGET,
        )

    def search(self, folder: Path, quick: bool) -> Searched:
        wanted = {name: Wanted(name, TARGET) for name in NAMES}
        return search(self.sweep(folder, quick), wanted, SEEDS[:2] if quick else SEEDS)


PROBLEMS = [Problem(n, alpha) for n in (10, 100) for alpha in (0.1, 0.5)]


def accuracy(run: History) -> float:
    return float(run.last("test_accuracy"))


def low_loss(run: History) -> float:
    return -float(run.last("train_loss"))


def smoothness(run: History) -> float:
    """Less the mean change of accuracy between two evaluations, over the second half."""
    values = run.series("test_accuracy")[1]
    return -float(np.abs(np.diff(values[len(values) // 2 :])).mean())


def accuracy_halfway(run: History) -> float:
    """After half of the rounds: what two gradients a step reach for the price of one."""
    values = run.series("test_accuracy")[1]
    return float(values[(len(values) - 1) // 2])


FULL, FULL_MILD, PART, PART_MILD = PROBLEMS
GAIN, GAIN_MILD = (gain("fedavg_m", "fedavg", problem, accuracy) for problem in (FULL, FULL_MILD))
LESS_LOSS = "(iii) All clients, Dirichlet 0.1: FedAvg-M-VR has less training loss than FedAvg-M"
CLAIMS = [
    Claim("(i) All clients, Dirichlet 0.1: FedAvg-M above FedAvg", GAIN),
    Claim("(i) That gain grows from Dirichlet 0.5 to 0.1", growth(GAIN, GAIN_MILD)),
    Claim("(ii) 10 of 100, Dirichlet 0.1: SCAFFOLD-M above SCAFFOLD", gain("scaffold_m", "scaffold", PART, accuracy)),
    Claim("(ii) 10 of 100, Dirichlet 0.5: the same", gain("scaffold_m", "scaffold", PART_MILD, accuracy)),
    Claim("(ii) 10 of 100, Dirichlet 0.1: SCAFFOLD-M smoother", gain("scaffold_m", "scaffold", PART, smoothness)),
    Claim(LESS_LOSS, gain("fedavg_m_vr", "fedavg_m", FULL, low_loss)),
    Claim("(iii) 10 of 100: SCAFFOLD-M-VR than SCAFFOLD-M", gain("scaffold_m_vr", "scaffold_m", PART, low_loss)),
]


def reproduce(runs: Path, figures: Path, quick: bool) -> str:
    """Run what is missing, draw, and give the page's text."""
    searched = {problem: problem.search(runs, quick) for problem in PROBLEMS}
    found = {problem: result.runs for problem, result in searched.items()}
    for problem, methods in found.items():
        figure = Figure(title=str(problem), x="round", y="test_accuracy", variants={})
        draw(figure, {NAMES[name]: histories for name, histories in methods.items()}, figures / f"{problem.name}.png")
    return "\n".join(page(searched, found, quick))


def page(searched: Mapping[Problem, Searched], found: Found, quick: bool) -> list[str]:
    some = next(iter(searched.values()))
    num_seeds, rounds = len(next(iter(some.runs.values()))), some.grid.records[0].trial.raw["rounds"]
    lines = [
        "# Momentum in local steps under label skew",
        "",
        "Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504.",
        "",
        f"`make reproduce NAME=momentum{' QUICK=1' * quick}`: Fashion-MNIST, MLP 784-50-10, client-wise Dirichlet,",
        f"20 local steps of batch 20, {rounds} rounds, beta {BETA}. Every method is tried with the same rates **on one",
        f"seed** ({PROBE}), and the rate with the highest accuracy at the end is run with {num_seeds} others",
        f"({SEEDS[0]} to {SEEDS[num_seeds - 1]}), of which all other numbers are: mean ± standard deviation.",
        "Halfway: after half of the rounds, where the VR forms, which take two gradients a step, have taken as many",
        "gradients as the others at the end.",
        QUICK * quick,
        "## What was to appear, and what did",
        "",
        *claims_table(CLAIMS, found),
        "",
        RULE,
        "",
        *why(searched),
    ]
    for problem, result in searched.items():
        lines += [f"## {str(problem)[0].upper()}{str(problem)[1:]}", "", f"![Accuracy](figures/{problem.name}.png)", ""]
        lines += ["| method | rate | accuracy | halfway | training loss |", "| --- | --- | --- | --- | --- |"]
        for name, measured in result.measured.items():
            reads = (accuracy, accuracy_halfway, lambda run: -low_loss(run))
            cells = [spread(measured.runs, read) for read in reads]
            lines.append(f"| {NAMES[name]} | {measured.rate_text} | {' | '.join(cells)} |")
        lines += ["", *grid(result)]
    return lines


def why(searched: Mapping[Problem, Searched]) -> list[str]:
    """What the grids say of claims that need a word beside their verdict."""
    rough, smooth = (jumps(searched[PART], name) for name in ("scaffold", "scaffold_m"))
    both = sorted(rate for rate in rough if rate in smooth)
    calmer = ", ".join(f"{rate:g}" for rate in both if smooth[rate] < rough[rate])
    lines = [
        "- *Smoother* compares each method at its own rate. At equal rates (the grid's seed, 10 of 100, Dirichlet 0.1)",
        f"  SCAFFOLD-M's accuracy changes less from one evaluation to the next than SCAFFOLD's at {calmer},",
        f"  of {', '.join(f'{rate:g}' for rate in both)}.",
    ]
    slowest = min(RATES)
    ends = [result.losses(name).get(slowest) for result in searched.values() for name in NAMES]
    some = [value for value in ends if value is not None]
    return [
        *lines,
        f"- The VR forms do best at the smallest rate tried, {slowest:g}, and far worse at all others: they do not",
        "  bear that a round moves far from the model at which their correction is taken (20 steps here; their limit",
        "  on quadratics is FedAvg's, whatever beta, so rate times steps has to be small). At that rate no method gets",
        f"  far in so few rounds: {min(some):.2f} to {max(some):.2f} over all methods and problems. What they save",
        "  in noise does not show at this budget. Their rule is from memory of the paper, and checked by identities",
        "  and plain twins.",
        "",
    ]


def jumps(result: Searched, method: str) -> dict[float, float]:
    """{rate: how much accuracy changes between evaluations late in the grid's run}."""
    rows = [row for row in result.grid.rows if row.setting.method == method and row.value is not None]
    return {row.setting.values[RATE]: -smoothness(runs_of(row)[0]) for row in rows}


def grid(result: Searched) -> list[str]:
    """Accuracy at the end by rate, on the seed by which rates are chosen."""
    rates = sorted({rate for name in NAMES for rate in result.losses(name)})
    lines = ["Accuracy at the end, on the grid's seed, by rate (-: diverged):", ""]
    lines += [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "| --- " * (len(rates) + 1) + "|"]
    for name, title in NAMES.items():
        values = result.losses(name)
        shown = (f"{values[rate]:.4f}" if rate in values else "-" for rate in rates)
        lines.append(f"| {title} | {' | '.join(shown)} |")
    diverged = sum(measured.diverged for measured in result.measured.values())
    num_runs = len(result.grid.records) + sum(len(measured.runs) for measured in result.measured.values())
    return [*lines, "", f"{num_runs} runs; {diverged} of the measured ones diverged.", ""]
