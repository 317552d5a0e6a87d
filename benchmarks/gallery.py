"""The gallery: one run of each strategy's own experiment file, drawn over rounds and over what it costs.

    python -m benchmarks.gallery [fedavg fedfix ...]

Plays configs/<strategy>.yaml (FedAvg's is configs/quickstart.yaml) as it stands, writes docs/gallery/<strategy>.png and
prints how long each took. The site's page docs/gallery.md shows them all.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fedsim.history import History, axis_scale, show
from fedsim.runs import run
from fedsim.strategies import STRATEGIES

FOLDER = Path("docs/gallery")
MEASURES = ("personal_accuracy", "test_accuracy", "distance", "test_loss")


def config(strategy: str) -> Path:
    """The experiment file that shows a strategy."""
    return Path("configs") / ("quickstart.yaml" if strategy == "fedavg" else f"{strategy}.yaml")


def measure(history: History) -> str:
    """What a run is judged by: the first of `MEASURES` that it has."""
    return next(key for key in MEASURES if key in history.keys())


def draw(history: History, path: Path) -> None:
    """Two panels, the measure over rounds and over virtual seconds, or over bits where clients have no clock."""
    from matplotlib.figure import Figure

    key = measure(history)
    clock = history.config["clients"]["devices"]["name"] != "constant"
    canvas = Figure(figsize=(6.4, 2.2), layout="constrained")
    axes = canvas.subplots(1, 2, sharey=True)
    for ax, x in zip(axes, ("round", "virtual_seconds" if clock else "bits_up"), strict=True):
        xs, ys = history.pairs(x, key)
        scale, label = axis_scale(x, float(xs.max()))
        ax.plot(xs / scale, ys, color="tab:blue")
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    if "accuracy" not in key:
        axes[0].set_yscale("log")
    axes[0].set_ylabel(key.replace("_", " "))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("strategies", nargs="*", default=list(STRATEGIES))
    for name in parser.parse_args().strategies:
        began = time.perf_counter()
        history = run(config(name))
        draw(history, FOLDER / f"{name}.png")
        key = measure(history)
        print(f"{name}: {key} {show(key, history.last(key))}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
