"""First results: four figures, each from one config and a few variants of its strategy, two seeds or more.

    python -m benchmarks.first_results [momentum clocks byzantine saddle] [--seeds 2]

Writes docs/figures/<name>.png and prints the table of docs/first-results.md. The band spans the seeds, the line is
their mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.history import History, axis_scale
from fedsim.runs import run

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        title: above it.
        x, y: keys of a row.
        variants: label -> overrides of the config.
        log: logarithmic y.
    """

    title: str
    x: str
    y: str
    variants: Mapping[str, Mapping[str, Any]]
    log: bool = False


LYING = {"clients.byzantine": {"attack": {"name": "foe"}, "count": 2}}
FIGURES = {
    "momentum": Figure(
        title="Fashion-MNIST, 10 clients, Dirichlet 0.1, full participation",
        x="round",
        y="test_accuracy",
        variants={
            "FedAvg": {},
            "FedAvg-M": {"strategy": {"name": "fedavg_m", "beta": 0.2}},
            "SCAFFOLD": {"strategy": {"name": "scaffold"}},
            "SCAFFOLD-M": {"strategy": {"name": "scaffold_m", "beta": 0.2}},
        },
    ),
    "clocks": Figure(
        title="Fashion-MNIST, 20 clients, Dirichlet 0.1, clocks F-80",
        x="virtual_seconds",
        y="test_accuracy",
        variants={
            "synchronous": {},
            "FedFix 0.5 s": {"strategy": {"name": "fedfix", "interval": 0.5}, "rounds": 120, "evaluate.every": 2},
            "asynchronous": {
                "strategy": {"name": "async_fedavg"},
                "local.optimizer.lr": 0.002,
                "rounds": 2460,
                "evaluate.every": 41,
            },
        },
    ),
    "byzantine": Figure(
        title="Fashion-MNIST, 16 peers, 2 byzantine (FOE), client-wise Dirichlet 1",
        x="round",
        y="test_accuracy",
        variants={
            "mean, nobody lies": {},
            "mean under attack": LYING,
            "MoNNA under attack": {"strategy": {"name": "monna", "beta": 0.9, "f": 2}, **LYING},
        },
    ),
    "saddle": Figure(
        title="Bilinear saddle point, 25 clients, 100 numbers",
        x="bits_up",
        y="distance",
        log=True,
        variants={
            "extragradient": {},
            "MASHA1, Rand-10 %": {
                "strategy": {"name": "masha1", "lr": 0.18, "p": 0.1, "compressor": {"name": "rand_k", "k": 10}}
            },
            "MASHA2, Top-10 %": {
                "strategy": {"name": "masha2", "lr": 0.1, "p": 0.1, "compressor": {"name": "top_k", "k": 10}}
            },
        },
    ),
}


def histories(name: str, seeds: int) -> dict[str, list[History]]:
    """{label: one history a seed}."""
    config = Path("configs/figures") / f"{name}.yaml"
    return {
        label: [run(config, seed=seed, **overrides) for seed in range(seeds)]
        for label, overrides in FIGURES[name].variants.items()
    }


def draw(figure: Figure, found: Mapping[str, Sequence[History]], path: Path) -> None:
    """One panel, as a file."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 3.8), layout="constrained")
    panel(canvas.add_subplot(), figure, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=120)


def panel(
    ax: Axes, figure: Figure, found: Mapping[str, Sequence[History]], colours: Sequence[str] | None = None
) -> None:
    """Mean line and band over the seeds, on a common grid of x."""
    if colours is not None:
        ax.set_prop_cycle(color=colours)
    largest = max(float(h.pairs(figure.x, figure.y)[0][-1]) for hs in found.values() for h in hs)
    scale, label = axis_scale(figure.x, largest)
    for name, runs in found.items():
        curves = [h.pairs(figure.x, figure.y) for h in runs]
        grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
        values = np.stack([np.interp(grid, x, y) for x, y in curves])
        (line,) = ax.plot(grid / scale, values.mean(0), label=name)
        ax.fill_between(grid / scale, values.min(0), values.max(0), alpha=0.2, color=line.get_color(), linewidth=0)
    if figure.log:
        ax.set_yscale("log")
    ax.set(title=figure.title, xlabel=label, ylabel=figure.y.replace("_", " "))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", default=list(FIGURES))
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    for name in arguments.figures:
        figure, found = FIGURES[name], histories(name, arguments.seeds)
        draw(figure, found, Path("docs/figures") / f"{name}.png")
        print(f"\n{figure.title}\n\n| method | final {figure.y} by seed | {figure.x} at the end |\n| --- | --- | --- |")
        for label, runs in found.items():
            final = ", ".join(f"{h.last(figure.y):.4g}" for h in runs)
            print(f"| {label} | {final} | {runs[0].last(figure.x):,.4g} |", flush=True)


if __name__ == "__main__":
    main()
