"""Every kind of model, and whole rounds, on a GPU: stacks beside a plain loop and torch.func on the same card.

    python -m benchmarks.gpu [--models "mlp 200" ...] [--widths 16 64 256 512] [--seconds 3] [--page FILE]

Steps: local steps of plain SGD for stacks of several widths. The plain loop takes one client after the other with
torch.optim.SGD; `vmap` is torch.func's gradient of as many clients as the widest stack, with the step written out. The
ways take turns; `eager` is the narrowest stack without CUDA graphs. A figure is microseconds for one client's step, the
best of all turns, each of which ends with a wait for the card. Launches and waits are what torch's profiler sees of one
stack's run of steps: kernels and graphs, and calls that stop the host until the card is done. The share is that of the
products' floating-point operations in what a large matrix product reaches on this card in the same precision. As in a
run, torch's deterministic algorithms are used, by all ways alike.

Rounds: the workloads of benchmarks.rounds, with the data on the card.

Side by side: whole rounds of 100 clients, three steps of 20 images each, with one, two and four workers (a CUDA stream
each), and with the samples on the card or in RAM.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rounds
from benchmarks.zoo import CASES, LR, STEPS, Case, Ways
from fedsim.compose import compose
from fedsim.engine.precision import same_bits_again
from fedsim.loop import Run
from fedsim.tasks.models import MODELS

RESNET_18 = partial(MODELS["resnet"], (3, 32, 32), 10, width=64, blocks=2, stages=4)
CASES_HERE = {**CASES, "resnet-18": Case(RESNET_18, (3, 32, 32))}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
STEPS_HEAD = [
    "model",
    "P",
    "plain us",
    "vmap us",
    "eager us (width)",
    "fedsim us (width)",
    "plain / fedsim",
    "launches a step",
    "waits",
    "share",
]
SIDE_HEAD = ["a round of", "workers", "samples", "best ms", "median ms"]
ROUNDS_HEAD = ["workload", "system", "first ms", "best ms", "median ms", "ratio", "difference"]


def vmapped(here: Ways) -> Callable[[], int]:
    """STEPS steps of all clients of `here` by torch.func."""
    module = here.module.to(here.device)
    names = [k for k, _ in module.named_parameters()]
    start = {k: v.detach().expand(len(here.inputs), *v.shape) for k, v in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        logits = functional_call(module, parameters, (inputs,))
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    step = vmap(grad(loss), randomness="different")

    def call() -> int:
        now = start
        for _ in range(STEPS):
            gradient = step(now, here.inputs, here.targets)
            now = {k: now[k] - LR * gradient[k] for k in names}
        return STEPS * len(here.inputs)

    return call


def flops(here: Ways) -> int:
    """Floating-point operations of the products in one client's step."""
    module = here.case.make().to(here.device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(module(here.inputs[0]).flatten(0, -2), here.targets[0].flatten()).backward()
    return counter.get_total_flops()


def peak(device: torch.device, n: int) -> float:
    """Floating-point operations a second of an n x n matrix product, the best of ten."""
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    best = min(timed(lambda: a @ b, device) for _ in range(10))
    return 2 * n**3 / best


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done with a call."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seen(call: Callable[[], int], device: torch.device) -> tuple[int, int]:
    """(kernels and graphs launched, waits of the host) of a call, as the profiler counts them; zeros without a GPU."""
    if device.type != "cuda":
        return 0, 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
    counts = {e.key: e.count for e in found.key_averages()}
    launches = sum(n for k, n in counts.items() if k.startswith(LAUNCHES))
    return launches, sum(counts.get(k, 0) for k in WAITS)


def steps_row(name: str, device: torch.device, widths: list[int], seconds: float, top: float) -> list[str]:
    """One line of the table of steps."""
    here = Ways(CASES_HERE[name], device, rows=max(widths))
    fits = [w for w in widths if w <= here.plan().width] or [here.plan().width]
    eager = here.engine(here.plan("stacked", fits[0]), graphs=False)
    ways = {"plain": here.plain(), "vmap": vmapped(here), "eager": eager}
    ways |= {str(w): here.engine(here.plan("stacked", w)) for w in fits}
    best = dict.fromkeys(ways, float("inf"))
    failed: dict[str, str] = {}
    started, turns = time.perf_counter(), 0
    while turns < 3 or time.perf_counter() - started < seconds:
        for way in ways.keys() - failed.keys():
            try:
                count = ways[way]()  # the first call of all compiles, and pays for memory
                best[way] = min(best[way], timed(ways[way], device) / count * 1e6)
            except (RuntimeError, NotImplementedError) as error:  # torch.func may not know a layer; a card may be full
                failed[way] = type(error).__name__
        turns += 1
    widest = min((str(w) for w in fits), key=best.__getitem__)
    launches, waits = seen(ways[widest], device)
    reached = flops(here) / (best[widest] * 1e-6)
    figures = "; ".join(f"{best[str(w)]:.1f} ({w})" for w in fits)
    return [
        name,
        f"{here.layout.size:,}",
        f"{best['plain']:.1f}",
        failed.get("vmap") or f"{best['vmap']:.1f}",
        f"{best['eager']:.1f} ({fits[0]})",
        figures,
        f"{best['plain'] / best[widest]:.1f}",
        f"{launches / STEPS:.0f}",
        f"{waits}",
        f"{reached / top:.1%}",
    ]


def rounds_rows(name: str, device: torch.device, num_rounds: int) -> list[list[str]]:
    """The lines of the table of rounds for one workload."""
    lines = []
    for label, row in rounds.measure(name, num_rounds, ["fp32"], ["auto"], device)["systems"].items():
        times = [f"{row[k]:.1f}" for k in ("first_ms", "best_ms", "median_ms")]
        lines.append([name.upper(), label, *times, f"{row['ratio']:.2f}", f"{row['difference']:.0e}"])
    return lines


def side_by_side(model: str, device: torch.device, num_rounds: int) -> Iterator[list[str]]:
    """The lines of the table of workers and places of samples for one model."""
    for data, workers in product(("device", "host"), (1, 2, 4)):
        config = {
            "rounds": num_rounds + 1,
            "task": {
                "name": "classification",
                "dataset": {"name": "blobs", "num_examples": 20_000, "shape": [1, 28, 28], "num_test": 0},
                "model": model,
            },
            "clients": {"count": 100},
            "strategy": {"name": "fedavg"},
            "local": {"steps": 3, "batch_size": 20, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}},
            "evaluate": {"every": 1000, "per_client": False},
            "runtime": {"device": str(device), "workers": workers, "data": data},
        }
        made = compose(config, model)
        run, times = Run(made.experiment), []
        for _ in range(num_rounds + 1):
            times.append(1000 * timed(run.step, device))
        made.close()
        yield [model, str(workers), data, f"{min(times[1:]):.1f}", f"{median(times[1:]):.1f}"]


def table(cells: list[str]) -> str:
    """A line of a table of Markdown; its head has a line below."""
    line = "| " + " | ".join(cells) + " |"
    return line + "\n|" + " --- |" * len(cells) if cells in (STEPS_HEAD, ROUNDS_HEAD, SIDE_HEAD) else line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=list(CASES_HERE), choices=list(CASES_HERE))
    parser.add_argument("--widths", nargs="+", type=int, default=[16, 64, 256, 512])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each model")
    parser.add_argument("--workloads", nargs="*", default=list(rounds.WORKLOADS), choices=list(rounds.WORKLOADS))
    parser.add_argument("--rounds", type=int, default=8, help="two at least: the first is told apart")
    parser.add_argument("--side-by-side", nargs="*", default=["mlp", "cnn", "resnet"], choices=list(MODELS))
    parser.add_argument("--matrix", type=int, default=8192, help="side of the product that the share is measured by")
    parser.add_argument("--page", type=Path, help="where to write the figures; printed without")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no CUDA device is visible; try the script itself with --device cpu")
    same_bits_again(device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    top = peak(device, args.matrix)
    lines = [
        f"{card}, {rounds.machine()}; a product of {args.matrix} x {args.matrix}: {top / 1e12:.1f} TFLOP/s in fp32."
    ]
    say(lines, "\n## Steps\n\n" + table(STEPS_HEAD))
    for name in args.models:
        say(lines, table(steps_row(name, device, args.widths, args.seconds, top)))
    say(lines, "\n## Rounds\n\n" + table(ROUNDS_HEAD))
    for name in args.workloads:
        say(lines, "\n".join(table(line) for line in rounds_rows(name, device, args.rounds)))
    say(lines, "\n## Side by side\n\n" + table(SIDE_HEAD))
    for name in args.side_by_side:
        for line in side_by_side(name, device, args.rounds):
            say(lines, table(line))
    if args.page is not None:
        head = "# Measured on a GPU\n\nMade by `make gpu`; `benchmarks/gpu.py` says what is measured.\n\n"
        args.page.write_text(head + "\n".join(lines) + "\n")


def say(lines: list[str], text: str) -> None:
    """Keep a piece of the page, and show it."""
    lines.append(text)
    print(text, flush=True)


if __name__ == "__main__":
    main()
