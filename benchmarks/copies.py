"""How many copies of the model a round in process holds at most, beside those that the algorithm itself is about.

    python -m benchmarks.copies [--hidden 3000 2450] [--cases "FedAvg, momentum" ...] [--holders]

A copy is 4 P bytes, of an MLP with P of about 1e7. Four clients take part in each of three rounds, on one worker, in
stacks of one; rows that clients keep lie on disk. The plain loop is that of benchmarks/plain.py.

Counted are storages of at least a quarter of a copy that are alive after an operation, on all threads: a mode of
torch's dispatcher notes what operations take and give, and asks whether each is still there. `--holders` says in which
line those of the peak were made. Beside it stands what the system counted: the peak of resident memory above what the
process held before there was a large model. It is more by what kernels allocate inside an operation and by freed memory
that the allocator keeps. Each case is a process of its own.

Needed are, one client after the other: the server's vectors, those of a client at work, a round's sums, rows that are
kept when it is over, and replies that wait. What a run holds beyond that is the initial model, a stack's own copy of
what it was sent, and more than one sum of each field, for those of four stacks meet in a tree.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.plain import OneProcess, Problem
from benchmarks.rounds import machine
from fedsim.compose import compose
from fedsim.loop import Run
from fedsim.tasks.models import MODELS, init_parameters

CLIENTS, SAMPLES, BATCH, ROUNDS = 4, 60, 20, 3
SGD = {"name": "sgd", "lr": 0.05}
PLAIN = "plain loop"
LARGE, SMALL = [3000, 2450], [300, 300]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "FedAvg in factors": ({"name": "fedavg"}, SGD, 3, "x; y; a sum"),
    "FedAvg in steps": ({"name": "fedavg"}, SGD | {"schedule": {"name": "constant"}}, 3, "x; y; a sum"),
    "FedAvg, momentum": ({"name": "fedavg"}, SGD | {"momentum": 0.9}, 5, "x; y, g, m; a sum"),
    "FedAvg, AdamW": ({"name": "fedavg"}, {"name": "adamw", "lr": 0.001}, 6, "x; y, g, m, v; a sum"),
    "FedAvg, server's Adam": (
        {"name": "fedavg", "server_optimizer": {"name": "adam", "lr": 0.01}},
        SGD,
        5,
        "x, m, v; y; a sum",
    ),
    "SCAFFOLD in factors": ({"name": "scaffold"}, SGD, 11, "x, c; y, c_i, its new value; two sums; 4 rows"),
    "SCAFFOLD-M in factors": ({"name": "scaffold_m"}, SGD, 12, "x, c, g; y, c_i, its new value; two sums; 4 rows"),
    "FedBuff, c = 2": (
        {"name": "fedbuff", "buffer_size": 2},
        SGD,
        7,
        "x, that of 2 jobs in flight; 2 replies, 2 wait; y",
    ),
    "FedBuff, streaming, c = 2": (
        {"name": "fedbuff_stream", "buffer_size": 2, "concurrency": 4},
        SGD,
        8,
        "x, those of 2 jobs in flight; 2 replies, 2 wait; y",
    ),
    "MoNNA": ({"name": "monna", "f": 1}, SGD, 9, "x; 4 vectors sent, 4 mixed"),
}
"""{case: (strategy, local optimizer, copies that are needed, which)}."""


@dataclass
class Live:
    """Storages that are alive, of what threads do inside `counting`.

    Args:
        least: bytes of a storage that counts.
        earlier: storages that do not count.

    Attributes:
        peak: bytes, the most that were alive after an operation.
        holders: {lines in which they were first seen: bytes}, of that moment.
    """

    least: int
    earlier: Iterable[UntypedStorage] = ()
    peak: int = 0
    holders: Counter[str] = field(default_factory=Counter)
    _known: dict[int, tuple[StorageWeakRef, int, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._not_ours = {storage._cdata for storage in self.earlier}

    def take(self, values: Any, where: str = "") -> None:
        """Note the tensors of a tree, or storages."""
        for value in tree_leaves(values):
            storage = value.untyped_storage() if isinstance(value, Tensor) else value
            if isinstance(storage, UntypedStorage) and storage.nbytes() >= self.least:
                key = storage._cdata
                if key not in self._not_ours and (key not in self._known or self._known[key][0].expired()):
                    self._known[key] = StorageWeakRef(storage), storage.nbytes(), where or _lines()

    def look(self) -> None:
        """Add up what is still there."""
        self._known = {key: known for key, known in list(self._known.items()) if not known[0].expired()}
        total = sum(nbytes for _, nbytes, _ in self._known.values())
        if total > self.peak:
            self.peak, self.holders = total, Counter()
            for _, nbytes, where in self._known.values():
                self.holders[where] += nbytes

    def counting(self) -> TorchDispatchMode:
        """A context in which this thread's operations are seen."""
        return _Counting(self)


class _Counting(TorchDispatchMode):
    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live.take((args, kwargs, out))
        self.live.look()
        return out


def storages() -> list[UntypedStorage]:
    """Of all tensors of this process on the host; to ask other objects for their class may warn."""
    found = (value for value in gc.get_objects() if issubclass(type(value), Tensor))
    return [t.untyped_storage() for t in found if t.device.type == "cpu" and t.layout is torch.strided]


def _lines() -> str:
    """The nearest three lines of this project that led here."""
    found, here = list[str](), Path(__file__).parents[1]
    at: FrameType | None = sys._getframe(2)
    while at is not None and len(found) < 3:
        path = Path(at.f_code.co_filename)
        if path.is_relative_to(here) and path != Path(__file__):
            found.append(f"{path.name}:{at.f_lineno}")
        at = at.f_back
    return " < ".join(found)


def config(case: str, hidden: list[int], shape: tuple[int, ...] = (1, 28, 28)) -> dict[str, Any]:
    """The experiment of one case."""
    strategy, optimizer, *_ = CASES[case]
    data = {"name": "blobs", "num_examples": SAMPLES * CLIENTS, "shape": list(shape), "num_test": 0}
    return {
        "rounds": 1000,
        "task": {"name": "classification", "dataset": data, "model": {"name": "mlp", "hidden": hidden}},
        "clients": {"count": CLIENTS, "devices": {"name": "lognormal", "median": 0.01, "sigma": 0.5}},
        "strategy": strategy,
        "local": {"epochs": 1, "batch_size": BATCH, "optimizer": optimizer},
        "evaluate": {"every": 1000, "per_client": False},
        "runtime": {"workers": 1, "stack": 1, "memory": "disk"},
    }


def play(raw: dict[str, Any], rounds: int = ROUNDS) -> tuple[float, dict[str, float]]:
    """(copies at the peak of so many rounds, {lines: copies} of those)."""
    earlier = storages()
    with tempfile.TemporaryDirectory() as folder:
        composition = compose(raw, "copies")
        composition.memory.folder = Path(folder)
        experiment = composition.experiment
        num_parameters = experiment.task.layout.size
        live = Live(num_parameters, earlier)
        runner = composition.executor.runner
        alone = runner.run

        def watched(jobs: Any) -> Any:
            with live.counting():  # of the worker's thread
                return alone(jobs)

        runner.run = watched  # type: ignore[method-assign]
        run = Run(experiment)
        live.take(storages(), "before the first round")
        with live.counting():
            for _ in range(rounds):
                run.step()
        composition.close()
    copy = 4 * num_parameters
    return live.peak / copy, {where: nbytes / copy for where, nbytes in live.holders.most_common()}


def play_plain(hidden: list[int], rounds: int = ROUNDS) -> tuple[float, dict[str, float]]:
    """The same of the plain loop."""
    make = partial(MODELS["mlp"], (1, 28, 28), 10, hidden=hidden)
    _, x0 = init_parameters(make, seed=0)
    live = Live(len(x0))
    rows = torch.arange(SAMPLES * CLIENTS).view(CLIENTS, SAMPLES)
    inputs, targets = torch.zeros(rows.numel(), 1, 28, 28), torch.zeros(rows.numel(), dtype=torch.int64)
    cohorts = torch.arange(CLIENTS).expand(rounds, CLIENTS)
    system = OneProcess(Problem(make, x0, inputs, targets, rows, BATCH, 0.05, cohorts), threads=1)
    live.take(storages(), "before the first round")
    with live.counting():
        for r in range(rounds):
            system.round(r)
    return live.peak / 4 / len(x0), {where: n / 4 / len(x0) for where, n in live.holders.most_common()}


def measured(case: str, hidden: list[int]) -> tuple[float, float, dict[str, float]]:
    """(copies at the peak, the same as the system saw it, {lines: copies}) of a case in this process."""

    def resident(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(float(line.split()[1]) for line in lines if line.startswith(key))

    torch.set_num_threads(1)
    for size in (SMALL, hidden):  # once on a small model, or what is loaded and compiled would count
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        peak, holders = play_plain(size) if case == PLAIN else play(config(case, size))
    _, x0 = init_parameters(partial(MODELS["mlp"], (1, 28, 28), 10, hidden=hidden), seed=0)
    return peak, (resident("VmHWM") - before) / 4 / len(x0), holders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=LARGE)
    parser.add_argument("--cases", nargs="+", default=[PLAIN, *CASES], choices=[PLAIN, *CASES])
    parser.add_argument("--holders", action="store_true")
    args = parser.parse_args()
    print(machine())
    print("| a round of | needed | counted | resident | needed are |\n| --- | --- | --- | --- | --- |")
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for case in args.cases:
            peak, resident, holders = pool.submit(measured, case, args.hidden).result()
            needed, which = (4, "x; y, g; a sum") if case == PLAIN else CASES[case][2:]
            print(f"| {case} | {needed} | {peak:.1f} | {resident:.1f} | {which} |", flush=True)
            for where, copies in holders.items() if args.holders else ():
                print(f"    {copies:.1f} {where}", flush=True)


if __name__ == "__main__":
    main()
