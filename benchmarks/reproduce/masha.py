"""Saddle points over compressed links: distance against uplink bits, as in Beznosikov et al., arXiv:2110.03313.

Bilinear problems of 25 clients whose matrices are rotations of one spectrum, with and without strong monotonicity.
Every method is tried with the same steps on one seed, which draws the problem too, and the step that needs fewest bits
to the target is run with three others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.first_results import Figure, draw
from benchmarks.reproduce.claims import (
    QUICK,
    RATE,
    RULE,
    Claim,
    Found,
    Gains,
    Measured,
    Wanted,
    claims_table,
    gain,
    search,
    spread,
)
from fedsim.history import History
from fedsim.sweep import Sweep, parse_space

OWN_FILE, DESCENT_FILE = Path("configs/figures/saddle.yaml"), Path("configs/local_descent_ascent.yaml")
RATES = (0.05, 0.1, 0.2, 0.35, 0.5)
CLIENTS, ROUNDS, PROBE, SEEDS, TARGET = 25, 600, 0, (1, 2, 3), 1e-3
RAND, TOP = "{name: rand_k, k: 10}", "{name: top_k, k: 10}"
OWN_STEP = (
    "strategy.name=extragradient,optimistic_gradient,masha1,masha2",
    "masha1,masha2:strategy.p=0.1",
    f"masha1:strategy.compressor={RAND}",
    f"masha2:strategy.compressor={TOP}",
)
ADVERSARY = (
    "strategy.name=extragradient,optimistic_gradient,masha1",
    "masha1:strategy.p=0.1",
    "masha1:strategy.compressor={name: rand_k, k: 4}",
    "task={name: robust_logistic, dim: 20, samples: 50}",
)
FAILING = ("strategy.name=extragradient,optimistic_gradient", f"uplink.compressor={RAND}")
DESCENT = (
    "strategy.name=fedavg,diana",
    f"fedavg:uplink.compressor={RAND}",
    f"diana:strategy.compressor={RAND}",
    "local.steps=1",
    f"stop.distance={TARGET}",
    "evaluate.every=2",
)
NAMES = {
    "extragradient": "extragradient",
    "optimistic_gradient": "optimistic gradient",
    "masha1": "MASHA1, Rand-10%",
    "masha2": "MASHA2, Top-10%",
    "compressed": "extragradient, Rand-10%",
    "compressed_optimistic": "optimistic gradient, Rand-10%",
    "fedavg": "QSGDA, Rand-10%",
    "diana": "DIANA-SGDA, Rand-10%",
}
Measures = dict[str, Measured]


@dataclass(frozen=True)
class Group:
    """Methods that are tried with the same steps.

    Args:
        folder: of its runs, in that of its problem.
        config: of all of them.
        texts: what else makes their grid.
        rate: the key of the step.
        rates: the steps.
        wanted: {title: method, and what its step is chosen by}.
    """

    folder: str
    config: Path
    texts: tuple[str, ...]
    rate: str
    rates: tuple[float, ...]
    wanted: Mapping[str, Wanted]

    def sweep(self, runs: Path, quick: bool) -> Sweep:
        """The grid: every method, every step, one seed."""
        rates = ",".join(map(str, self.rates[1:3] if quick else self.rates))
        common = f"rounds={20 if quick else ROUNDS}", f"{self.rate}={rates}"
        return Sweep(
            config=self.config,
            space=parse_space([*self.texts, *common], "strategy.name", str(self.config)),
            folder=runs / self.folder,
            seeds=(PROBE,),
            target="bits_up",
            minimise=True,
        )

    def search(self, runs: Path, quick: bool) -> Measures:
        """{method: its best step's runs}."""
        return search(self.sweep(runs, quick), self.wanted, SEEDS[:2] if quick else SEEDS, self.rate).measured


@dataclass(frozen=True, eq=False)
class Problem:
    """What methods are compared on."""

    title: str
    name: str
    groups: tuple[Group, ...]

    def search(self, runs: Path, quick: bool) -> Measures:
        """{method: its best step's runs}."""
        return {name: m for group in self.groups for name, m in group.search(runs / self.name, quick).items()}


def by_bits(*names: str) -> dict[str, Wanted]:
    """Methods that reach the target, by what they send until then."""
    return {name: Wanted(name, "bits_up") for name in names}


def bilinear(lam: float) -> Problem:
    """Bilinear saddle points of this strong monotonicity."""
    here, names = (f"task.lam={lam}",), ("extragradient", "optimistic_gradient", "masha1", "masha2")
    own = Group("own-step", OWN_FILE, (*OWN_STEP, *here), "strategy.lr", RATES, by_bits(*names))
    descent = {"fedavg": Wanted("fedavg", "distance")} | by_bits("diana")
    failing = {"compressed": "extragradient", "compressed_optimistic": "optimistic_gradient"}
    away = {title: Wanted(name, "distance") for title, name in failing.items()}
    other = (
        Group("descent", DESCENT_FILE, (*DESCENT, *here), RATE, RATES, descent)
        if lam
        else Group("compressed", OWN_FILE, (*FAILING, *here), "strategy.lr", RATES, away)
    )
    return Problem(f"lam = {lam:g}", f"lam{lam:g}", (own, other))


def adversary(devices: int) -> Problem:
    """Robust logistic regression with so many devices, the stand-in for adversarial training."""
    texts, names = (*ADVERSARY, f"clients.count={devices}"), ("extragradient", "optimistic_gradient", "masha1")
    group = Group("", OWN_FILE, texts, "strategy.lr", RATES[1:], by_bits(*names))
    return Problem(f"{devices} devices", f"adversary{devices}", (group,))


FREE, STRONG, FEW, MANY = PROBLEMS = (bilinear(0.0), bilinear(0.5), adversary(10), adversary(25))


def distance(run: History) -> float:
    return float(run.last("distance"))


def megabits(run: History) -> float:
    """Up, a client, to the target or to the run's end."""
    return float(run.last("bits_up")) / run.config["clients"]["count"] / 1e6


def saved(run: History) -> float:
    return -megabits(run)


def fewer_by(factor: float, better: str, than: str, problem: Problem) -> Gains:
    return gain(better, than, problem, lambda run: -factor * megabits(run), saved)


CLAIMS = [
    Claim("lam = 0: MASHA1 takes fewer bits than extragradient", gain("masha1", "extragradient", FREE, saved)),
    Claim("lam = 0: a third fewer", fewer_by(1.5, "masha1", "extragradient", FREE)),
    Claim("lam = 0: MASHA1 takes fewer than optimistic gradient", gain("masha1", "optimistic_gradient", FREE, saved)),
    Claim("lam = 0: MASHA2 takes fewer than extragradient", gain("masha2", "extragradient", FREE, saved)),
    Claim("lam = 0.5: MASHA1 takes fewer than extragradient", gain("masha1", "extragradient", STRONG, saved)),
    Claim("lam = 0.5: MASHA1 takes fewer than DIANA-SGDA", gain("masha1", "diana", STRONG, saved)),
    Claim("lam = 0: compressed extragradient stays away", gain("compressed", "masha1", FREE, distance)),
    Claim("lam = 0.5: QSGDA stays away", gain("fedavg", "masha1", STRONG, distance)),
    Claim("10 devices: MASHA1 takes fewer than extragradient", gain("masha1", "extragradient", FEW, saved)),
    Claim("25 devices: MASHA1 takes fewer than extragradient", gain("masha1", "extragradient", MANY, saved)),
    Claim("10 devices: MASHA1 takes fewer than optimistic gradient", gain("masha1", "optimistic_gradient", FEW, saved)),
    Claim(
        "25 devices: MASHA1 takes fewer than optimistic gradient", gain("masha1", "optimistic_gradient", MANY, saved)
    ),
]


def reproduce(runs: Path, figures: Path, quick: bool) -> str:
    """Run what is missing, draw, and give the page's text."""
    measured = {problem: problem.search(runs, quick) for problem in PROBLEMS}
    found: Found = {problem: {name: m.runs for name, m in methods.items()} for problem, methods in measured.items()}
    for problem, methods in found.items():
        figure = Figure(title=problem.title, x="bits_up", y="distance", variants={}, log=True)
        draw(figure, {NAMES[name]: histories for name, histories in methods.items()}, picture(figures, problem))
    return "\n".join(page(measured, found, quick)) + "\n"


def picture(figures: Path, problem: Problem) -> Path:
    return figures / f"masha-{problem.name}.png"


def page(measured: Mapping[Problem, Measures], found: Found, quick: bool) -> list[str]:
    lines = [
        "# Saddle points over compressed links",
        "",
        "Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov. Distributed Methods with Compressed Communication for",
        "Solving Variational Inequalities, with Theoretical Guarantees. arXiv:2110.03313.",
        "",
        f"`make reproduce NAME=masha{' QUICK=1' * quick}`: bilinear saddle points, {CLIENTS} clients, x and y of 50",
        "numbers, matrices that are rotations of one spectrum from 0.5 to 2. The paper's own constants are not at",
        f"hand. Every method is tried with the steps {', '.join(map(str, RATES))} **on one seed** ({PROBE}); the one",
        f"that takes fewest bits to a distance of {TARGET:g}, in {ROUNDS} rounds, is run with others, which draw",
        "other problems: mean ± standard deviation. Methods that never get there are judged by how far they are at the",
        "end. Bits are those that one client sends, indices and refreshes included; p = 0.1.",
        "",
        "The stand-in for its adversarial training is robust logistic regression (`task: robust_logistic`): 10 and 25",
        "devices with 50 samples of 20 numbers each, around means of their own, and one perturbation of all samples in",
        f"a ball of 0.5; steps {', '.join(map(str, RATES[1:]))}. MASHA2, QSGDA and DIANA-SGDA have no prox for it.",
        QUICK * quick,
        "## What was to appear, and what did",
        "",
        *claims_table(CLAIMS, found),
        "",
        f"Gains are megabits a client, or distances. {RULE}",
        "",
        "Optimistic gradient sends half of extragradient's messages, whole ones. Where a method's step is the end of",
        "the grid, a longer one may do better; [first results](../first-results.md) tries extragradient's up to 0.6.",
        "",
    ]
    for problem, methods in measured.items():
        lines += [f"## {problem.title}", "", f"![Distance over bits](figures/{picture(Path(), problem).name})", ""]
        lines += ["| method | step | rounds | Mbit up a client | distance at the end | there |"]
        lines += ["| --- | --- | --- | --- | --- | --- |", *(row(NAMES[name], m) for name, m in methods.items()), ""]
    return lines


def row(name: str, m: Measured) -> str:
    rounds = mean(run.last("round") for run in m.runs)
    there = sum(distance(run) <= TARGET for run in m.runs)
    cells = f"{rounds:.0f} | {spread(m.runs, megabits)} | {spread(m.runs, distance)}"
    return f"| {name} | {m.rate_text} | {cells} | {there} of {len(m.runs)} |"
