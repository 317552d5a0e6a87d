"""What other strategies cost beside FedAvg on W1 (1,000 clients x 60 images, MLP 784-200-10, 100 clients at a time).

    python -m benchmarks.strategies [--rounds 12]

Chains of linear layers whose clients see few samples are taken in factors (fedsim/engine/low_rank.py). The ratios are
to FedAvg with its steps taken one by one, and each strategy stands here both ways. Streaming FedBuff has 100 clients
in flight and aggregates every 10 arrivals. Rounds are interleaved; best and median are shown, the ratio compares best
with best.
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
    "Mime": ({"name": "mime", "cohort_size": 100}, 100),
    "MimeLite": ({"name": "mime_lite", "cohort_size": 100}, 100),
    "FedProx": ({"name": "fedprox", "cohort_size": 100, "mu": 0.1}, 100),
    "FedDyn": ({"name": "feddyn", "cohort_size": 100, "alpha": 0.1}, 100),
    "SCAFFOLD-M": ({"name": "scaffold_m", "cohort_size": 100}, 100),
    "FedBuff, 100 in flight": ({"name": "fedbuff_stream", "buffer_size": 10, "concurrency": 100}, 10),
}
DEVICES = {"devices": {"name": "lognormal", "median": 0.01, "sigma": 0.5}}


class Running:
    """One strategy, round after round."""

    def __init__(self, strategy: dict[str, Any], updates: int, factors: bool) -> None:
        raw = {**W1, "strategy": strategy, "clients": {**W1["clients"], **DEVICES}}
        if not factors:
            raw["runtime"] = {"stack": 6}  # what the rule gives where steps are taken one by one
        self.composition: Composition = compose(raw, "W1")
        if not factors:
            self.composition.experiment.task.engine.chain = None  # type: ignore[attr-defined]
        self.updates, self.r = updates, 0
        experiment = self.composition.experiment
        self.state = experiment.strategy.init(experiment.task.init(0))

    def step(self) -> float:
        """Seconds per client update of one round (for a buffered strategy: of as many rounds as make 100 updates)."""
        experiment = self.composition.experiment
        start = time.perf_counter()
        for _ in range(100 // self.updates):
            self.state, _ = experiment.strategy.round(self.state, experiment.fleet, server_rng(0, "server", self.r))
            experiment.fleet.end_round()
            self.r += 1
        return (time.perf_counter() - start) / 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="3 or more: the first two are not counted")
    arguments = parser.parse_args()
    images()  # says so early where the data set is missing
    torch.set_num_threads(1)
    print(machine())
    running = {
        f"{name}, in {'factors' if factors else 'steps'}": Running(*settings, factors)
        for name, settings in STRATEGIES.items()
        for factors in (False, True)
    }
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(arguments.rounds):
        for name, one in running.items():
            times[name].append(one.step())
    for one in running.values():
        one.composition.close()
    best = {name: min(t[2:]) for name, t in times.items()}
    print(f"{'W1, per client update':34s} {'best':>9s} {'median':>9s}  of FedAvg in steps")
    for name, t in times.items():
        ratio = best[name] / best["FedAvg, in steps"]
        print(f"{name:34s} {1e3 * best[name]:7.3f}ms {1e3 * statistics.median(t[2:]):7.3f}ms  {ratio:5.2f}x")


if __name__ == "__main__":
    main()
