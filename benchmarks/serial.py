"""What a Ray run's driver does alone, and what that leaves for many workers to gain; Ray beside the process itself.

    python -m benchmarks.serial [--workloads w1 w2 scaffold_m] [--rounds 12] [--workers 2]

W1 and W2 are those of benchmarks.rounds; scaffold_m is SCAFFOLD with momentum on W1. All are composed from a config, in
process (as many threads as workers) and on Ray, and their rounds take turns. Of processor time, which other work on the
machine moves less than the clock, it shows medians a round: t, what the process itself takes, and s, what the run and
Ray's driver take on Ray, where workers do the rest; and the same of an evaluation after the first. Of the clock it
shows the best round on Ray over the best in process. W workers then reach at most (t + s) / (t / min(W, 64) + s) times
the speed of one, for a call has 64 groups of stacks at most: an upper bound, as it leaves out what travels meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.rounds import WORKLOADS, machine
from fedsim.compose import compose
from fedsim.loop import Run
from fedsim.sim.executor import MAX_GROUPS

CASES = {"w1": ("w1", "fedavg"), "w2": ("w2", "fedavg"), "scaffold_m": ("w1", "scaffold_m")}
WARM = {"w1": 1, "w2": 1, "scaffold_m": 10}  # rounds until whatever clients keep has its place
WORKERS = (8, 64, 512)
LOOKS = 2  # evaluations, of 70,000 samples each


def config(case: str, executor: str, workers: int) -> dict[str, Any]:
    """The experiment, in process or on Ray."""
    name, strategy = CASES[case]
    load = WORKLOADS[name]
    return {
        "rounds": 1000,
        "task": {"name": "classification", "dataset": {"name": "benchmarks.rounds:images"}, "model": load.model},
        "partition": "iid",
        "clients": {"count": load.clients},
        "strategy": {"name": strategy, "cohort_size": load.cohort, "selection": "cyclic"},
        "local": {"epochs": 1, "batch_size": load.batch, "shuffle": False, "optimizer": {"name": "sgd", "lr": 0.05}},
        "evaluate": {"every": 1000},
        "runtime": {"executor": executor, "workers": workers, "stacks": 1},
    }


def measured(call: Callable[[], object]) -> tuple[float, float]:
    """(milliseconds of the clock, of the processor's time)."""
    clock, before = time.perf_counter(), spent()
    call()
    return 1e3 * (time.perf_counter() - clock), 1e3 * (spent() - before)


def spent() -> float:
    """Seconds of processor time of this process and of the one that drives Ray for it, without those below that."""
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())


def row(case: str, rounds: int, workers: int) -> list[str]:
    """A line of the table."""
    made = {executor: compose(config(case, executor, workers), case) for executor in ("in_process", "ray")}
    runs = {executor: Run(composition.experiment) for executor, composition in made.items()}
    steps: dict[str, list[tuple[float, float]]] = {executor: [] for executor in runs}
    looks: dict[str, list[tuple[float, float]]] = {executor: [] for executor in runs}
    for _ in range(WARM[case]):
        for run in runs.values():
            run.step()
    for r in range(rounds):
        for executor, run in runs.items():
            steps[executor].append(measured(run.step))
            if r < LOOKS:
                looks[executor].append(measured(run.evaluation))
    for composition in made.values():
        composition.close()
    ratio = min(clock for clock, _ in steps["ray"]) / min(clock for clock, _ in steps["in_process"])
    t, s = (statistics.median(cpu for _, cpu in steps[executor]) for executor in ("in_process", "ray"))
    look, own = (looks[executor][-1][1] for executor in ("in_process", "ray"))  # the first pays for what is made once
    reach = [(t + s) / (t / min(w, MAX_GROUPS) + s) for w in WORKERS]
    times = [f"{v:.1f}" for v in (t, s, look, own)]
    return [case, *times, f"{ratio:.2f}", *(f"{r:.1f}" for r in reach)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(machine())
    head = ["t, ms", "s, ms", "evaluation, ms", "of the driver, ms", f"{args.workers} on Ray / in process"]
    print("| workload | " + " | ".join([*head, *(f"{w} workers" for w in WORKERS)]) + " |")
    print("|" + " --- |" * (len(head) + 1 + len(WORKERS)))
    for case in args.workloads:
        print("| " + " | ".join(row(case, args.rounds, args.workers)) + " |", flush=True)


if __name__ == "__main__":
    main()
