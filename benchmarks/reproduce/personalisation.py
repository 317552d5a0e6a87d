"""One model for all, or one for each client: accuracy on what clients hold out, from strong label skew to almost none.

FedAvg against its own model fine-tuned by each client, FedRep (Collins et al. arXiv:2102.07078) and Ditto (Li et al.
arXiv:2012.04221), with one grid of rates for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.reproduce.claims import (
    QUICK,
    RATE,
    RULE,
    Claim,
    Found,
    Gains,
    Measured,
    Read,
    Searched,
    Wanted,
    claims_table,
    gain,
    growth,
    search,
    spread,
)
from fedsim.sweep import Choice, Space, Sweep

CONFIG = Path("configs/figures/personalisation.yaml")
ROUNDS, RATES = 30, (0.03, 0.1, 0.3)
PROBE, SEEDS = 0, (1, 2, 3)
METHODS = {
    "fedavg": {"evaluate.personalise.epochs": 1},
    "fedrep": {"strategy.head_epochs": 2},
    "ditto": {"strategy.lam": 0.1},
}
OWN, OF_ALL = "personal_accuracy", "global_accuracy"
GLOBAL, TUNED, FEDREP, DITTO = "global model (FedAvg)", "fine-tuned", "FedRep", "Ditto"
WANTED = {
    GLOBAL: Wanted("fedavg", OF_ALL),
    TUNED: Wanted("fedavg", OWN),
    FEDREP: Wanted("fedrep", OWN),
    DITTO: Wanted("ditto", OWN),
}


@dataclass(frozen=True)
class Skew:
    """Clients' shares of the classes are drawn from a Dirichlet law: the smaller alpha, the fewer classes each has."""

    alpha: float

    def __str__(self) -> str:
        return f"Dirichlet {self.alpha:g}{', almost iid' * (self.alpha > 10)}"

    def sweep(self, folder: Path, quick: bool) -> Sweep:
        """The grid: every method, every rate, one seed."""
        common = {
            "strategy.name": Choice(tuple(METHODS)),
            RATE: Choice(RATES[1:] if quick else RATES),
            "partition.alpha": self.alpha,
            "rounds": 2 if quick else ROUNDS,
        }
        space = Space(common, METHODS, per="strategy.name")
        return Sweep(config=CONFIG, space=space, folder=folder / f"alpha{self.alpha:g}", seeds=(PROBE,), target=OWN)

    def search(self, folder: Path, quick: bool) -> Searched:
        return search(self.sweep(folder, quick), WANTED, SEEDS[:2] if quick else SEEDS)


STRONG, MILD, NONE = SKEWS = (Skew(0.1), Skew(0.5), Skew(100.0))


def scored(title: str, kind: str = "accuracy") -> Read:
    """What clients score: with the server's model where that is the method, else with their own."""
    whose = "global" if title == GLOBAL else "personal"
    return lambda run: float(run.last(f"{whose}_{kind}"))


def above(title: str, than: str, skew: Skew, kind: str = "accuracy") -> Gains:
    """By how much clients score more with one method than with another, in each seed."""
    return gain(title, than, skew, scored(title, kind), scored(than, kind))


def claims() -> list[Claim]:
    """What the papers lead one to expect, and where it should end."""
    own = (TUNED, FEDREP, DITTO)
    strong = {title: above(title, GLOBAL, STRONG) for title in own}
    mild = {title: above(title, GLOBAL, MILD) for title in own}
    none = {title: above(title, GLOBAL, NONE) for title in own}
    tenth = "accuracy_worst_decile"
    return [
        *(Claim(f"{STRONG}: {title} above the global model", strong[title]) for title in own),
        *(Claim(f"{MILD}: {title} above the global model", mild[title]) for title in own),
        *(Claim(f"{title}: that gain grows from 0.5 to 0.1", growth(strong[title], mild[title])) for title in own),
        *(Claim(f"{title}: it grows from 100 to 0.5", growth(mild[title], none[title])) for title in own),
        *(Claim(f"{NONE}: the global model above {title}", above(GLOBAL, title, NONE)) for title in own),
        Claim(f"{STRONG}: FedRep above fine-tuning", above(FEDREP, TUNED, STRONG)),
        Claim(f"{STRONG}: Ditto above the global model in the worst tenth", above(DITTO, GLOBAL, STRONG, tenth)),
    ]


def reproduce(runs: Path, figures: Path, quick: bool) -> str:
    """Run what is missing, draw, and give the page's text."""
    searched = {skew: skew.search(runs, quick) for skew in SKEWS}
    found = {skew: result.runs for skew, result in searched.items()}
    draw(found, figures / "personalisation.png")
    return page(searched, found, quick)


def draw(found: Found, path: Path) -> None:
    """Mean accuracy and that of the worst tenth of clients, by skew: a point a seed, a line through their means."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9.6, 3.8), layout="constrained")
    panels = canvas.subplots(1, 2)
    for ax, kind, what in (
        (panels[0], "accuracy", "all clients"),
        (panels[1], "accuracy_worst_decile", "worst tenth of clients"),
    ):
        for k, title in enumerate(WANTED):
            places = np.arange(len(SKEWS)) + (k - (len(WANTED) - 1) / 2) * 0.12
            values = np.array([[scored(title, kind)(run) for run in found[skew][title]] for skew in SKEWS])
            ax.plot(places, values.mean(1), color=f"C{k}", linewidth=1, label=title)
            ax.plot(places, values, "o", color=f"C{k}", alpha=0.6, markersize=4)
        ax.set_xticks(range(len(SKEWS)), [f"{skew.alpha:g}" for skew in SKEWS])
        ax.set(title=what, xlabel="Dirichlet alpha of clients' classes", ylabel="accuracy on held-out samples")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    canvas.savefig(path, dpi=100)


INTRO = """# One model for all, or one for each client

FedRep: Collins, Hassani, Mokhtari, Shakkottai, [arXiv:2102.07078](https://arxiv.org/abs/2102.07078). Ditto: Li, Hu,
Beirami, Smith, [arXiv:2012.04221](https://arxiv.org/abs/2012.04221). Both say that models of clients' own are more
accurate on clients' own data than one model for all, where these data differ.

`make reproduce NAME=personalisation{option}`, made by `benchmarks/reproduce/personalisation.py`: every number below is
of that run. 50 clients share the first 12,000 images of Fashion-MNIST, 240 each, with classes by a client-wise
Dirichlet law, and hold out a fifth of theirs, on which they are scored. MLP 784-50-10, {rounds} rounds of 10 clients,
two epochs of batch 20. FedRep's head takes two epochs of its own before, and Ditto pulls with lam = 0.1. The
fine-tuned model is FedAvg's after one epoch on the client's own samples.

Every method is tried with the same rates **on one seed** ({probe}). The rate at which clients score most at the end,
chosen for the global model and for the fine-tuned one each by itself, is run with the seeds {seeds}, of which
all numbers are: mean ± standard deviation.
{quick}
![Accuracy by skew](figures/personalisation.png)

A point is a seed, a line joins their means.

## What was to appear, and what did

{claims}

{rule}
"""


def page(searched: Mapping[Skew, Searched], found: Found, quick: bool) -> str:
    some = searched[STRONG]
    intro = INTRO.format(
        option=" QUICK=1" * quick,
        rounds=some.grid.records[0].trial.raw["rounds"],
        probe=PROBE,
        seeds=", ".join(map(str, SEEDS[: len(found[STRONG][GLOBAL])])),
        quick=QUICK * quick,
        claims="\n".join(claims_table(claims(), found)),
        rule=RULE,
    )
    return "\n".join([intro, *(line for skew, result in searched.items() for line in table(skew, result))])


def table(skew: Skew, result: Searched) -> list[str]:
    """Markdown of one skew."""
    head = "method | rate | clients' own model | worst tenth | deviation over clients | the server's model"
    lines = [f"## {skew}", "", f"| {head} |", "| --- " * 6 + "|"]
    for title, measured in result.measured.items():
        lines.append(f"| {title} | {measured.rate_text} | {' | '.join(cells(title, measured))} |")
    diverged = sum(measured.diverged for measured in result.measured.values())
    return [*lines, "", f"{diverged} of the measured runs diverged." if diverged else "No measured run diverged.", ""]


def cells(title: str, measured: Measured) -> list[str]:
    """Of its line; the global model is every client's own there."""
    kinds = ("accuracy", "accuracy_worst_decile", "accuracy_std")
    of_all = "-" if title == FEDREP else spread(measured.runs, lambda run: float(run.last(OF_ALL)))
    return [*(spread(measured.runs, scored(title, kind)) for kind in kinds), of_all]
