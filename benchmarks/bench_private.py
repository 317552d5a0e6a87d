"""What the private gradient of a stack costs: from what layers leave, from samples' gradients formed in chunks, and,
for comparison, the ordinary gradient.

    python -m benchmarks.bench_private [--models mlp,cnn] [--clients 10] [--samples 64] [--json FILE]

Times are medians of several rounds in one process, the ways taking turns, as ratios to the first. Memory is the peak
above what the process held before the first call, each way in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from fedsim.engine import Batch
from fedsim.engine.losses import cross_entropy
from fedsim.engine.stacked import StackedEngine
from fedsim.params import Layout
from fedsim.tasks.models import MODELS, init_parameters
from fedsim.tasks.samples import Program, SamplesOracle

WAYS = ("layers", "samples", "plain")
SHAPES = {"char_lstm": (80,), "transformer": (80,)}  # others see images of 28 x 28
OPTIONS: dict[str, dict[str, object]] = {"mlp": {"hidden": [200, 200]}, "char_lstm": {"hidden": 128}}


def ways(model: str, clients: int, samples: int) -> dict[str, Callable[[], object]]:
    """One step of each way on the same stack and batch."""
    shape, classes = SHAPES.get(model, (1, 28, 28)), 80 if model in SHAPES else 10
    module, x0 = init_parameters(partial(MODELS[model], shape, classes, **OPTIONS.get(model, {})), seed=0)
    layout, loss = Layout.of_module(module), cross_entropy
    generator = torch.Generator().manual_seed(0)
    rows = (clients, samples)
    if model in SHAPES:
        inputs = torch.randint(classes, (*rows, *shape), generator=generator)
        targets = torch.randint(classes, (*rows, *shape), generator=generator)
    else:
        inputs = torch.randn(*rows, *shape, generator=generator)
        targets = torch.randint(classes, rows, generator=generator)
    engine, batch = StackedEngine(module, layout, loss), Batch(inputs, targets)
    x = x0.repeat(clients, 1)
    oracle = SamplesOracle(Program(module, layout, loss), batch, x[:, layout.num_trainable :])
    bounds = torch.ones(1)
    return {
        "layers": lambda: oracle._clipped_by_layers(x, bounds),
        "samples": lambda: oracle._clipped_by_samples(x, bounds),
        "plain": lambda: engine.session(x).gradient(batch),
    }


def peak(model: str, clients: int, samples: int, way: str) -> float:
    """MiB that two steps add to a fresh process."""
    torch.set_num_threads(1)
    step = ways(model, clients, samples)[way]
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from what is held now (Linux)
    before = _peak_kib()
    step(), step()
    return (_peak_kib() - before) / (1 << 10)


def _peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def seconds(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of a step, the ways taking turns."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds + 1):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            times[way].append(time.perf_counter() - start)
    return {way: statistics.median(found[1:]) for way, found in times.items()}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mlp,cnn")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = []
    for model in args.models.split(","):
        times = seconds(ways(model, args.clients, args.samples), args.rounds)
        for way in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                mib = fresh.submit(peak, model, args.clients, args.samples, way).result()
            ms, ratio = times[way] * 1e3, times[way] / times["layers"]
            found.append({"model": model, "way": way, "ms": ms, "ratio": ratio, "peak_mib": mib})
            print(f"{model:<12} {way:<8} {ms:9.1f} ms   {ratio:5.2f} x   {mib:7.0f} MiB", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
