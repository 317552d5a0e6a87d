"""Rounds of SCAFFOLD whose clients' rows lie on disk, by the number of clients: seconds, peak memory, bytes saved.

    python -m benchmarks.memory [--clients 1000 10000 100000] [--rounds 25] [--every 8] [--folder DIR]
    python -m benchmarks.memory --strategy fedbuff --clients 2000 --rounds 60    # all of them in flight, buffers of 10

W1 with memory: an MLP 784-200-10, of which a client keeps 636 kB; 60 of 60,000 images for each client, drawn for it
alone, so that an image belongs to several where clients are many; batch 20 (3 steps), 100 clients a round. Each size is
a run in a process of its own; they take turns round by round, so that a drift of the machine serves them alike. Peak
memory is what the process took (VmHWM) above what it held before the first round, data and torch; times are medians, by
the clock and of the processor. A round after a checkpoint includes it; what it wrote is the files that it left.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import images
from fedsim.compose import compose
from fedsim.data import FederatedData
from fedsim.loop import Run

SAMPLES = 60
STRATEGIES = {"scaffold": {"cohort_size": 100}, "fedbuff": {"buffer_size": 10}}


def drawn_for_each(*, num_clients: int) -> FederatedData:
    """So many clients with 60 images each, whoever else has them."""
    source, draw = images(), torch.Generator().manual_seed(0)
    return FederatedData(
        inputs=source.inputs,
        targets=source.targets,
        offsets=torch.arange(num_clients + 1) * SAMPLES,
        order=torch.randint(len(source.inputs), (num_clients * SAMPLES,), generator=draw),
        test_inputs=source.test_inputs,
        test_targets=source.test_targets,
        num_classes=10,
    )


def run(config: dict[str, Any], folder: Path, parent: Connection) -> None:
    """A run that waits for its turn before every round, and tells what the one before took."""
    composition = compose(config, "config")
    composition.memory.folder = folder / "memory"
    started, spent, peak_before = 0.0, 0.0, 0.0
    files: dict[Path, int] = {}  # of all checkpoints so far, those that are gone included

    def kilobytes(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(key))

    def turn(row: Any = None) -> None:
        nonlocal started, spent
        took, cpu = time.perf_counter() - started, time.process_time() - spent
        files.update((p, p.stat().st_size) for p in (folder / "checkpoints").rglob("*") if p.is_file())
        parent.send((took, cpu, (kilobytes("VmHWM") - peak_before) * 1024, sum(files.values())))
        parent.recv()
        started, spent = time.perf_counter(), time.process_time()

    peak_before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    turn()
    list(Run(composition.experiment, folder=folder, watch=turn).rounds())
    composition.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=25, help="each touches the rows of 100 clients, 64 MB")
    parser.add_argument("--every", type=int, default=8, help="rounds between checkpoints")
    parser.add_argument("--folder", type=Path, help="where the rows lie for so long")
    parser.add_argument("--memory", choices=["disk", "ram"], default="disk")
    parser.add_argument("--strategy", choices=list(STRATEGIES), default="scaffold")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        ends, processes = dict[int, Any](), []
        for n in args.clients:
            ends[n], other = spawn.Pipe()
            processes.append(spawn.Process(target=run, args=(config(n, args), Path(root) / str(n), other)))
            processes[-1].start()
        told = {n: [end.recv()] for n, end in ends.items()}
        for _ in range(args.rounds):
            for n, end in ends.items():
                end.send(None)
                told[n].append(end.recv())
        for end, process in zip(ends.values(), processes, strict=True):
            end.send(None)  # what is left is the last checkpoint
            process.join()
    print("clients  a round, ms  CPU, ms  with a checkpoint, ms  CPU, ms  peak, MB  a checkpoint wrote, MB")
    for n, rows in told.items():
        # the first rounds draw what is kept, and the last evaluates
        plain = [row for k, row in enumerate(rows[3:-1], 3) if k % args.every != 1]
        saving = rows[args.every + 1 : -1 : args.every]
        times = [1e3 * statistics.median(row[k] for row in some) for some in (plain, saving) for k in (0, 1)]
        peak, wrote = max(row[2] for row in rows) / 1e6, (rows[-1][3] - rows[-1 - args.every][3]) / 1e6
        print(
            f"{n:7,} {times[0]:12,.0f} {times[1]:8,.0f} {times[2]:22,.0f} {times[3]:8,.0f} {peak:9,.0f} {wrote:23,.0f}"
        )


def config(num_clients: int, args: argparse.Namespace) -> dict[str, Any]:
    """The experiment of one size."""
    dataset = {"name": "benchmarks.memory:drawn_for_each", "num_clients": num_clients}
    return {
        "rounds": args.rounds,
        "task": {"name": "classification", "dataset": dataset, "model": "mlp"},
        "partition": "natural",
        "strategy": {"name": args.strategy, **STRATEGIES[args.strategy]},
        "local": {"epochs": 1, "batch_size": 20, "shuffle": False, "optimizer": {"name": "sgd", "lr": 0.05}},
        "evaluate": {"every": args.rounds, "per_client": False},
        "checkpoint": {"every": args.every},
        "runtime": {"memory": args.memory},
    }


if __name__ == "__main__":
    main()
