"""Momentum in local steps under label skew: the orderings of Cheng, Huang, Wu, Yuan, arXiv:2306.16504.

One grid of rates for every method, the same seeds for all, and the best rate of each by its mean final accuracy. What
the paper's models, data and K were is not copied (CIFAR-10, ResNet-18): an MLP on Fashion-MNIST fits two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from benchmarks.first_results import Figure, draw
from fedsim.history import History
from fedsim.sweep import Results, Sweep, parse_space, play
from fedsim.sweep.shown import Shown, write_page

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
RATES = (0.02, 0.05, 0.1, 0.2, 0.4)
ROUNDS, SEEDS = 200, (0, 1, 2)


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
            seeds=SEEDS[:2] if quick else SEEDS,
            target="test_accuracy",
        )


PROBLEMS = [Problem(n, alpha) for n in (10, 100) for alpha in (0.1, 0.5)]
Found = Mapping[Problem, Mapping[str, Sequence[History]]]  # {method: its best setting's runs, one a seed}


@dataclass(frozen=True)
class Claim:
    """What the paper leads one to expect: the numbers of each seed should be above zero."""

    text: str
    gains: Callable[[Found], list[float]]

    def line(self, found: Found) -> str:
        """Its line in the page's table."""
        gains = self.gains(found)
        return f"| {self.text} | {', '.join(f'{gain:+.4f}' for gain in gains)} | {verdict(gains)} |"


def gain(better: str, than: str, problem: Problem, read: Callable[[History], float]) -> Callable[[Found], list[float]]:
    """By how much one method is above another in each seed."""
    return lambda found: [read(a) - read(b) for a, b in zip(found[problem][better], found[problem][than], strict=True)]


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


def _gap_grows(found: Found) -> list[float]:
    strong = gain("fedavg_m", "fedavg", FULL, accuracy)(found)
    mild = gain("fedavg_m", "fedavg", FULL_MILD, accuracy)(found)
    return [a - b for a, b in zip(strong, mild, strict=True)]


LESS_LOSS = "(iii) All clients, Dirichlet 0.1: FedAvg-M-VR has less training loss than FedAvg-M"
CLAIMS = [
    Claim("(i) All clients, Dirichlet 0.1: FedAvg-M above FedAvg", gain("fedavg_m", "fedavg", FULL, accuracy)),
    Claim("(i) That gain grows from Dirichlet 0.5 to 0.1", _gap_grows),
    Claim("(ii) 10 of 100, Dirichlet 0.1: SCAFFOLD-M above SCAFFOLD", gain("scaffold_m", "scaffold", PART, accuracy)),
    Claim("(ii) 10 of 100, Dirichlet 0.5: the same", gain("scaffold_m", "scaffold", PART_MILD, accuracy)),
    Claim("(ii) 10 of 100, Dirichlet 0.1: SCAFFOLD-M smoother", gain("scaffold_m", "scaffold", PART, smoothness)),
    Claim(LESS_LOSS, gain("fedavg_m_vr", "fedavg_m", FULL, low_loss)),
    Claim("(iii) 10 of 100: SCAFFOLD-M-VR than SCAFFOLD-M", gain("scaffold_m_vr", "scaffold_m", PART, low_loss)),
]


def reproduce(runs: Path, figures: Path, quick: bool) -> str:
    """Run what is missing, draw, and give the page's text."""
    swept: dict[Problem, Results] = {}
    for problem in PROBLEMS:
        plan = problem.sweep(runs, quick)
        with Shown(plan.folder) as shown:
            swept[problem] = play(plan, shown)
        write_page(swept[problem])
        check_complete(problem, swept[problem])
    found = {problem: best_runs(results) for problem, results in swept.items()}
    for problem, methods in found.items():
        figure = Figure(title=str(problem), x="round", y="test_accuracy", variants={})
        draw(figure, {NAMES[name]: histories for name, histories in methods.items()}, figures / f"{problem.name}.png")
    return "\n".join(page(swept, found, quick))


def check_complete(problem: Problem, results: Results) -> None:
    """Refuse to compare with a method of which no rate has a value for every seed."""
    for method in NAMES:
        if method not in results.best:
            raise SystemExit(
                f"{problem}: no rate of {NAMES[method]} came to its end with every seed; see "
                f"{results.folder}/sweep.csv, and call the same again"
            )


def best_runs(results: Results) -> dict[str, list[History]]:
    return {
        method: [History.load(record.trial.folder) for record in row.records] for method, row in results.best.items()
    }


def page(swept: Mapping[Problem, Results], found: Found, quick: bool) -> list[str]:
    some = next(iter(swept.values()))
    seeds, rounds = len(some.rows[0].records), some.rows[0].records[0].trial.raw["rounds"]
    lines = [
        "# Momentum in local steps under label skew",
        "",
        "Cheng, Huang, Wu, Yuan. Momentum Benefits Non-IID Federated Learning Simply and Provably. arXiv:2306.16504.",
        "",
        f"`make reproduce NAME=momentum{' QUICK=1' * quick}`: Fashion-MNIST, MLP 784-50-10, client-wise Dirichlet,",
        f"20 local steps of batch 20, {rounds} rounds, beta {BETA}. Every method is run with the same rates and",
        f"{seeds} seeds; the tables show its best rate by mean final accuracy, mean ± standard deviation over seeds.",
        "Halfway: after half of the rounds, where the VR forms, which take two gradients a step, have taken as many",
        "gradients as the others at the end.",
        "",
        *(["**A quick run, of a budget that shows nothing.**", ""] if quick else []),
        "## What was to appear, and what did",
        "",
        "| claim | gain in each seed | verdict |",
        "| --- | --- | --- |",
        *(claim.line(found) for claim in CLAIMS),
        "",
        "A gain appears where its mean is above two standard errors of the seeds; below minus two it is reversed.",
        "",
    ]
    for problem, results in swept.items():
        lines += [f"## {str(problem)[0].upper()}{str(problem)[1:]}", "", f"![Accuracy](figures/{problem.name}.png)", ""]
        lines += ["| method | best rate | accuracy | halfway | training loss |", "| --- | --- | --- | --- | --- |"]
        for method, runs in found[problem].items():
            rate = results.best[method].setting.values["local.optimizer.lr"]
            edge = " (end of the grid)" if results.at_the_edge(results.best[method]) else ""
            cells = [spread(runs, read) for read in (accuracy, accuracy_halfway, lambda run: -low_loss(run))]
            lines.append(f"| {NAMES[method]} | {rate:g}{edge} | {' | '.join(cells)} |")
        diverged = sum(record.ended.status == "diverged" for record in results.records)
        lines += ["", f"{len(results.records)} runs, {diverged} of them diverged.", ""]
    return lines


def verdict(gains: Sequence[float]) -> str:
    """
    >>> verdict([0.02, 0.03, 0.02]), verdict([0.02, -0.01, 0.0]), verdict([-0.02, -0.03, -0.02])
    ('appears', 'not told apart', 'reversed')
    """
    error = stdev(gains) / len(gains) ** 0.5
    middle = mean(gains)
    return "appears" if middle > 2 * error else "reversed" if middle < -2 * error else "not told apart"


def spread(runs: Sequence[History], read: Callable[[History], float]) -> str:
    values = [read(run) for run in runs]
    return f"{mean(values):.4f} ± {stdev(values):.4f}"
