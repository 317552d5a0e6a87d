"""How fast one optimizer step of a stack is, as ratios measured side by side in one process.

    python -m benchmarks.bench_optim [--rules sgd,adamw,...] [--threads 1] [--apart 1088] [--json FILE]

For C clients with P parameters each, time of ours over torch's fused optimizer on one flat [C * P] parameter: SGD
(plain and with momentum) and AdamW over their own, aim 1.3; any other elementwise rule over AdamW, aim 1.6 scaled by
the bytes that each must move (adamw 28, lion 20, ...). Rules with norms per tensor are shown without an aim. `auto` is
what a run takes; the verdict is on the fastest of `--backends`. The first step (recording and compiling, or finding the
compiled step in the user's cache) is shown in seconds. Last, C separate torch.optim.AdamW(foreach=True) over our
stacked AdamW step, at least 5.

    python -m benchmarks.bench_optim --rules adamw,adan --backends auto,inductor

sets torch.compile beside the back end that a run takes, on a CPU too, where no run takes it.

Ours and theirs take turns; the ratio is that of the best rounds, and the brackets hold the ratios of single rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import pages
from fedsim.optim import Optimizer, OptState, build
from fedsim.optim.assemble import assemble
from fedsim.optim.backends import INDUCTOR
from fedsim.params import Layout

# Bytes per parameter that one pass must move in float32: x and each changed state read and written, g read.
BYTES = {
    "sgd": 12,
    "sgd_unchecked": 12,
    "momentum": 20,
    "lion": 20,
    "signum": 20,
    "adagrad": 20,
    "rmsprop": 20,
    "schedule_free_sgd": 20,
    "adamw": 28,
    "adabelief": 28,
    "yogi": 28,
    "nadam": 28,
    "radam": 28,
    "spam": 28,
    "schedule_free_adamw": 28,
    "diffgrad": 36,
    "adan": 44,
}
SGD = ("sgd", "sgd_unchecked", "momentum")
OTHERS = {
    "lamb": 40,
    "adamp": 40,
    "stable_spam": 36,
}
Result = dict[str, Any]
Row = dict[str, Any]
SPECS: dict[str, dict[str, Any]] = {
    "momentum": {"name": "sgd", "momentum": 0.9},
    "sgd_unchecked": {"name": "sgd", "skip_nonfinite": False},  # as torch's: no look at what is not finite
}
LR = 1e-9  # small enough to keep the numbers where they are over thousands of steps


def layout_of(size: int) -> Layout:
    """A three-layer perceptron's shapes, of about `size` parameters."""
    width = int((size / 3) ** 0.5)
    rest = size - 2 * width * width - 2 * width
    return Layout.of({"a.w": (width, width), "a.b": (width,), "b.w": (width, width), "b.b": (width,), "c.w": (1, rest)})


def once(step: Callable[[], object], repeats: int) -> float:
    """Seconds per step over `repeats` steps."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def compare(steps: dict[str, Callable[[], object]], theirs: Callable[[], object], seconds: float) -> dict[str, Result]:
    """Best microseconds of each step and of theirs, and the ratios, all taking turns; two warm-up steps each."""
    everyone = {**steps, "theirs": theirs}
    for step in everyone.values():
        step(), step()
    repeats = max(1, int(seconds / 10 / max(once(theirs, 3), 1e-7)))
    rounds = [{name: once(step, repeats) for name, step in everyone.items()} for _ in range(9)]
    best = {name: min(r[name] for r in rounds) for name in everyone}
    return {
        name: {
            "ours_us": best[name] * 1e6,
            "theirs_us": best["theirs"] * 1e6,
            "ratio": best[name] / best["theirs"],
            "range": (min(r[name] / r["theirs"] for r in rounds), max(r[name] / r["theirs"] for r in rounds)),
        }
        for name in steps
    }


def our_step(rule: str, x: Tensor, g: Tensor, layout: Layout, backend: str) -> Callable[[], None]:
    decay = 0.0 if rule in SGD else 0.01
    spec = {"name": rule, **SPECS.get(rule, {}), "lr": LR, "weight_decay": decay}
    if backend == "inductor":
        optimizer = build(spec, layout)
        state = optimizer.init(x)
        return lambda: inductor_step(optimizer, x, g, state)
    optimizer = build({**spec, "backend": backend}, layout)
    state = optimizer.init(x)
    return lambda: optimizer.step_(x, g, state)


def inductor_step(optimizer: Optimizer, x: Tensor, g: Tensor, state: OptState) -> None:
    """`Optimizer.step_` by torch.compile, which no optimizer takes on a CPU."""
    block, after = assemble(optimizer.recipe, x, state, lr_scale=1.0, aux={}, streams=None)
    state.advance(len(x), INDUCTOR.step(optimizer.recipe, x, g, block), after)


def fused(rule: str, x: Tensor, g: Tensor) -> Callable[[], object]:
    p = nn.Parameter(x.reshape(-1).clone())
    p.grad = g.reshape(-1)
    if rule in ("sgd", "sgd_unchecked"):
        return torch.optim.SGD([p], LR, fused=True).step
    if rule == "momentum":
        return torch.optim.SGD([p], LR, 0.9, fused=True).step
    return torch.optim.AdamW([p], LR, fused=True).step


def separate_clients(x: Tensor, g: Tensor, layout: Layout) -> Callable[[], None]:
    steps = []
    for row, grad in zip(x, g, strict=True):
        params = [nn.Parameter(v.clone()) for v in layout.views(row).values()]
        for p, v in zip(params, layout.views(grad).values(), strict=True):
            p.grad = v.clone()
        steps.append(torch.optim.AdamW(params, LR, foreach=True).step)
    return lambda: [step() for step in steps] and None


def measure(rule: str, clients: int, size: int, args: argparse.Namespace) -> list[Row]:
    """A row for each back end."""
    layout = layout_of(size)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(clients, layout.size, generator=generator).to(args.device)
    g = torch.rand(clients, layout.size, generator=generator).to(args.device)
    own = rule in (*SGD, "adamw")
    aim = 1.3 if own else 1.6 * BYTES[rule] / BYTES["adamw"] if rule in BYTES else None
    steps = {backend: our_step(rule, x, g, layout, backend) for backend in args.backends.split(",")}
    first = {backend: once(step, 1) for backend, step in steps.items()}
    found = compare(steps, fused(rule if own else "adamw", x, g), args.seconds)
    about = {"rule": rule, "C": clients, "P": size, "aim": aim}
    return [{**about, "backend": n, "first_seconds": first[n], **result} for n, result in found.items()]


def measure_clients(clients: int, size: int, args: argparse.Namespace) -> Row:
    """C optimizers over one stack."""
    layout = layout_of(size)
    x, g = torch.ones(clients, layout.size), torch.ones(clients, layout.size)
    stack = our_step("adamw", x, g, layout, "auto")
    found = compare({"separate": separate_clients(x, g, layout)}, stack, args.seconds / 10)["separate"]
    return {"rule": "separate adamw", "backend": "torch", "C": clients, "P": size, "aim": 5.0, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default=",".join([*BYTES, *OTHERS]))
    parser.add_argument("--clients", default="1,10,100")
    parser.add_argument("--sizes", default="10000,1000000")
    parser.add_argument("--backends", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=0.2, help="of torch's steps in each comparison")
    parser.add_argument("--max-entries", type=int, default=20_000_000, help="leave out larger stacks (memory)")
    parser.add_argument("--json", default=None)
    parser.add_argument(
        "--apart", type=int, default=pages.APART, help="bytes between the beginnings of a step's arrays"
    )
    args = parser.parse_args()
    pages.APART = args.apart
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s)")
    print(
        f"{'rule':20} {'backend':9} {'C':>4} {'P':>8} {'ours us':>9} {'theirs us':>9} {'first s':>8} ratio [range] aim"
    )
    stacks = [(int(c), int(p)) for p in args.sizes.split(",") for c in args.clients.split(",")]
    for clients, size in stacks:
        if size * clients > args.max_entries:
            continue
        for rule in args.rules.split(","):
            rows += show(measure(rule, clients, size, args))
        if clients > 1 and size <= 100_000:
            rows += show([measure_clients(clients, size, args)])
    print(verdicts(rows))
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


def show(rows: list[Row]) -> list[Row]:
    for row in rows:
        low, high = row["range"]
        aim = "" if row["aim"] is None else f"{row['aim']:.2f}"
        print(
            f"{row['rule']:20} {row['backend']:9} {row['C']:4} {row['P']:8} {row['ours_us']:9.0f}"
            f" {row['theirs_us']:9.0f} {row.get('first_seconds', 0):8.2f}"
            f" {row['ratio']:5.2f} [{low:.2f}-{high:.2f}] {aim}",
            flush=True,
        )
    return rows


def verdicts(rows: list[Row]) -> str:
    """For each rule and stack the faster back end's ratio, its aim, and whether it holds."""
    lines, missed = ["", f"{'rule':20} {'C':>4} {'P':>8} {'fastest':9} ratio  aim"], 0
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row["aim"] is not None:
            groups.setdefault((row["rule"], row["C"], row["P"]), []).append(row)
    for (rule, clients, size), group in groups.items():
        best = min(group, key=lambda row: row["ratio"])
        holds = best["ratio"] >= best["aim"] if best["backend"] == "torch" else best["ratio"] <= best["aim"]
        missed += not holds
        verdict = "holds" if holds else "MISSED"
        lines.append(
            f"{rule:20} {clients:4} {size:8} {best['backend']:9} {best['ratio']:5.2f} {best['aim']:4.2f} {verdict}"
        )
    return "\n".join([*lines, f"{len(groups) - missed} of {len(groups)} aims hold"])


if __name__ == "__main__":
    main()
