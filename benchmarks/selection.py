"""What choosing a cohort costs the server: 100 of a million clients, their losses given.

    python -m benchmarks.selection [--clients 1000000] [--size 100] [--repeats 20]

Power-of-choice draws 200 candidates, whose losses are at hand here: asking them is a job like any other. Oort knows a
tenth of the clients. Rounds are interleaved; best and median are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from benchmarks.rounds import machine
from fedsim.fleet import Replies
from fedsim.strategies.selection import SELECTIONS, Among, Known, Selection
from fedsim.streams import server_rng


def selections(clients: int, size: int) -> dict[str, Selection]:
    """Each of the table, with settings for so many clients."""
    settings = {
        "fixed": {"probabilities": tuple((np.arange(1.0, clients + 1) * 2 / (clients * (clients + 1))).tolist())},
        "power_of_choice": {"candidates": 2 * size},
        "cyclic": {"shuffle": True},
    }
    return {name: kind(**settings.get(name, {})) for name, kind in SELECTIONS.items()}


def told(selection: Selection, known: Known, clients: int) -> Known:
    """What it knows once a tenth of the clients has replied."""
    ids = torch.arange(0, clients, 10)
    losses = 1.0 + ids.double() % 7
    replies = Replies(ids, torch.full_like(ids, 60), losses, seconds=1.0 + losses, logged={"train_loss": losses})
    return selection.noted(known, replies, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    n, size = arguments.clients, arguments.size
    torch.set_num_threads(1)
    print(machine())
    chosen = selections(n, size)
    known = {name: told(one, one.start(n, size), n) for name, one in chosen.items()}
    ids, samples = torch.arange(n), 1 + torch.arange(n) % 100
    ones = torch.ones(size, dtype=torch.float64)
    few = Replies(ids[:size], samples[:size], ones, seconds=ones, logged={"train_loss": ones})
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for repeat in range(arguments.repeats):
        among = Among(ids, size, samples, 1 + repeat, lambda who: 1.0 + who.double() % 7)
        for name, one in chosen.items():
            start = time.process_time()
            _, known[name] = one.choose(known[name], among, server_rng(0, "server", repeat))
            one.noted(known[name], few, repeat)
            times[name].append(time.process_time() - start)
    print(f"{f'{size} of {n:,} clients':34s} {'best':>9s} {'median':>9s}")
    for name, t in times.items():
        print(f"{name:34s} {1e3 * min(t):7.2f}ms {1e3 * statistics.median(t):7.2f}ms")


if __name__ == "__main__":
    main()
