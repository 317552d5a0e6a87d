"""What exchanges between 1,000 peers cost beside their local steps (digits, MLP 64-100-10, batches of 25).

    python -m benchmarks.peers [--peers 1000] [--rounds 8]

A round of decentralised SGD on each graph, beside its first half alone, which is what the local steps cost. Both are in
CPU seconds of this process, rounds interleaved; best and median are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.rounds import machine
from fedsim.compose import compose
from fedsim.streams import server_rng

GRAPHS: dict[str, Any] = {
    "ring": "ring",
    "8 neighbours": {"name": "random_regular", "degree": 8},
    "one peer at a time": {"name": "exponential", "one_peer": True},
    "complete": "complete",
}


class Running:
    """Peers on one graph, round after round."""

    def __init__(self, topology: Any, peers: int) -> None:
        raw = {
            "task": {"name": "classification", "dataset": "digits", "model": {"name": "mlp", "hidden": [100]}},
            "clients": {"count": peers},
            "strategy": {"name": "dsgd", "topology": topology},
            "local": {"batch_size": 25, "optimizer": {"name": "sgd", "lr": 0.1}},
            "runtime": {"workers": 1},
        }
        self.composition = compose(raw, "peers")
        experiment = self.composition.experiment
        self.strategy, self.fleet = experiment.strategy, experiment.fleet
        self.state = self.strategy.init(experiment.task.init(0))
        self.half: list[float] = []
        self.whole: list[float] = []

    def step(self) -> None:
        start = time.process_time()
        self.state, _ = self.strategy.round(self.state, self.fleet, server_rng(0, "server", self.fleet.round))
        self.fleet.end_round()
        between = time.process_time()
        strategy: Any = self.strategy
        self.fleet.ask(self.fleet.clients, strategy.half_step, cost=strategy.cost, x0=None)
        self.fleet.end_round()
        self.whole.append(between - start)
        self.half.append(time.process_time() - between)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    running = {name: Running(topology, arguments.peers) for name, topology in GRAPHS.items()}
    for _ in range(arguments.rounds + 1):
        for one in running.values():
            one.step()
    print(f"{'graph':20s} {'steps':>9s} {'round':>9s}   round / steps, best and median")
    for name, one in running.items():
        one.composition.close()
        pairs = [(choose(one.half[1:]), choose(one.whole[1:])) for choose in (min, statistics.median)]
        ratios = " ".join(f"{whole / half:5.2f}x" for half, whole in pairs)
        print(f"{name:20s} {1e3 * pairs[0][0]:7.1f}ms {1e3 * pairs[0][1]:7.1f}ms   {ratios}")


if __name__ == "__main__":
    main()
