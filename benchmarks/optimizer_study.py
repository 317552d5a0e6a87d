"""Eight rules as local optimizers, state fresh in each round against state kept by the client: a figure and a table.

    python -m benchmarks.optimizer_study [--seeds 2]

The learning rate of each rule and scope is chosen on a seed of its own, over the first half of the rounds, by the mean
test accuracy of its last four evaluations: three rates, a factor of about three apart, and further ones until both
neighbours of the best are worse. Then the whole run is played with the other seeds. Writes docs/figures/optimizers.png
and prints the table of docs/optimizers.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.history import History
from fedsim.runs import run

CONFIG = Path("configs/figures/optimizers.yaml")
FIGURE = Path("docs/figures/optimizers.png")
CHOOSING_SEED, LAST = 100, 4
RATES = [float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3)]
RULES: dict[str, tuple[dict[str, Any], float]] = {  # the rule, and the rate to begin with
    "sgd": ({"name": "sgd"}, 0.1),
    "momentum 0.9": ({"name": "sgd", "momentum": 0.9}, 0.01),
    "adagrad": ({"name": "adagrad"}, 0.01),
    "adamw": ({"name": "adamw"}, 0.001),
    "adan": ({"name": "adan"}, 0.001),
    "lion": ({"name": "lion"}, 0.0003),
    "lamb": ({"name": "lamb"}, 0.003),
    "sophia_g": ({"name": "sophia_g"}, 0.0003),
}
SCOPES = {"round": "state fresh in each round", "client": "state kept by the client"}


def play(rule: str, lr: float, scope: str, seed: int, **overrides: Any) -> History:
    """One run."""
    optimizer = {**RULES[rule][0], "lr": lr, "state_scope": scope}
    return run(CONFIG, seed=seed, **{"local.optimizer": optimizer}, **overrides)


def final(history: History) -> float:
    """Mean test accuracy of the last evaluations."""
    return float(np.mean(history.series("test_accuracy")[1][-LAST:]))


def best_rate(rule: str, scope: str, rounds: int) -> float:
    """The rate that beats both of its neighbours on the seed for choosing."""
    found: dict[float, float] = {}
    best, centre = RULES[rule][1], None
    while best != centre:
        centre, at = best, RATES.index(best)
        for lr in RATES[at - 1 : at + 2]:
            if lr not in found:
                found[lr] = final(play(rule, lr, scope, CHOOSING_SEED, rounds=rounds))
        best = max(found, key=lambda lr: found[lr])
    print(f"# {rule}, {scope}: " + ", ".join(f"{lr:g} -> {found[lr]:.4f}" for lr in sorted(found)), flush=True)
    return best


def study(seeds: int) -> dict[tuple[str, str], tuple[float, list[History]]]:
    """{(rule, scope): (learning rate, a history for each seed)}; plain SGD has no state, so it is played once."""
    from fedsim.overrides import read_file

    half = int(read_file(CONFIG)["rounds"]) // 2
    out: dict[tuple[str, str], tuple[float, list[History]]] = {}
    for rule in RULES:
        for scope in SCOPES:
            if rule == "sgd" and scope == "client":
                out[rule, scope] = out[rule, "round"]
                continue
            lr = best_rate(rule, scope, half)
            out[rule, scope] = lr, [play(rule, lr, scope, seed) for seed in range(seeds)]
    return out


def draw(found: dict[tuple[str, str], tuple[float, list[History]]]) -> None:
    """A panel for each scope, a line for each rule: the mean over the seeds, and the band they span."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9.4, 3.8), layout="constrained")
    axes = canvas.subplots(1, 2, sharey=True)
    for ax, (scope, title) in zip(axes, SCOPES.items(), strict=True):
        for i, rule in enumerate(RULES):
            series = [h.series("test_accuracy") for h in found[rule, scope][1]]
            values = np.stack([y for _, y in series])
            (line,) = ax.plot(series[0][0], values.mean(0), label=rule, color=f"C{i}", lw=1.4)
            ax.fill_between(series[0][0], values.min(0), values.max(0), alpha=0.15, color=line.get_color(), lw=0)
        ax.set(title=title, xlabel="round")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="test accuracy", ylim=(0.5, None))
    canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(FIGURE, dpi=120)


def show(found: dict[tuple[str, str], tuple[float, list[History]]]) -> None:
    """The table: learning rate, and the accuracy of every seed."""
    print("| rule | lr, `round` | accuracy, `round` | lr, `client` | accuracy, `client` |")
    print("| --- | --- | --- | --- | --- |")
    for rule in RULES:
        cells = []
        for scope in SCOPES:
            lr, histories = found[rule, scope]
            cells += [f"{lr:g}", ", ".join(f"{100 * final(h):.1f} %" for h in histories)]
        print(f"| {rule} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    found = study(parser.parse_args().seeds)
    draw(found)
    show(found)


if __name__ == "__main__":
    main()
