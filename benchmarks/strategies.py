"""What other strategies cost beside FedAvg on W1 (1,000 clients x 60 images, MLP 784-200-10, 100 clients at a time).

    python -m benchmarks.strategies [--rounds 12]

SCAFFOLD-M against FedAvg, per round; streaming FedBuff with 100 clients in flight (an aggregation every 10 arrivals)
against FedAvg, per client update. Rounds are interleaved; best and median are shown, the ratio compares best with best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.rounds import images, machine
from fedsim.compose import Composition, compose
from fedsim.streams import server_rng

W1: dict[str, Any] = {
    "task": {"name": "classification", "dataset": "fashion_mnist", "model": {"name": "mlp", "hidden": [200]}},
    "clients": {"count": 1000},
    "local": {"epochs": 1, "batch_size": 20, "optimizer": {"name": "sgd", "lr": 0.05}},
}
STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "FedAvg": ({"name": "fedavg", "cohort_size": 100}, 100),
    "SCAFFOLD-M": ({"name": "scaffold_m", "cohort_size": 100}, 100),
    "FedBuff, 100 in flight": ({"name": "fedbuff_stream", "buffer_size": 10, "concurrency": 100}, 10),
}
DEVICES = {"devices": {"name": "lognormal", "median": 0.01, "sigma": 0.5}}


class Running:
    """One strategy, round after round."""

    def __init__(self, strategy: dict[str, Any], updates: int) -> None:
        raw = {**W1, "strategy": strategy, "clients": {**W1["clients"], **DEVICES}}
        self.composition: Composition = compose(raw, "W1")
        self.updates, self.r = updates, 0
        experiment = self.composition.experiment
        self.state = experiment.strategy.init(experiment.task.init(0))

    def step(self) -> float:
        """Seconds per client update of one round (for a buffered strategy: of as many rounds as make 100 updates)."""
        experiment = self.composition.experiment
        start = time.perf_counter()
        for _ in range(100 // self.updates):
            experiment.fleet.round = self.r
            self.state, _ = experiment.strategy.round(self.state, experiment.fleet, server_rng(0, "server", self.r))
            self.r += 1
        return (time.perf_counter() - start) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    images()  # says so early where the data set is missing
    torch.set_num_threads(1)
    print(machine())
    running = {name: Running(*settings) for name, settings in STRATEGIES.items()}
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(arguments.rounds):
        for name, one in running.items():
            times[name].append(one.step())
    for one in running.values():
        one.composition.close()
    best = {name: min(t[2:]) for name, t in times.items()}
    print(f"{'W1, per client update':26s} {'best':>9s} {'median':>9s}  of FedAvg")
    for name, t in times.items():
        ratio = best[name] / best["FedAvg"]
        print(f"{name:26s} {1e3 * best[name]:7.3f}ms {1e3 * statistics.median(t[2:]):7.3f}ms  {ratio:5.2f}x")


if __name__ == "__main__":
    main()
