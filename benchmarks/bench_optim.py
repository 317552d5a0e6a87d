"""How fast one optimizer step of a stack is, as ratios measured side by side in one process.

    python benchmarks/bench_optim.py [--rules sgd,adamw,...] [--compiled] [--threads 1] [--json FILE]

For C clients with P parameters each:
- `fused`: time of ours over torch's own fused optimizer on one flat [C * P] parameter (sgd and adamw);
- `scaled`: time of ours over torch's fused AdamW, scaled by the bytes each rule must move (sgd 12, adamw 28, ...);
- `clients`: C separate torch.optim.AdamW(foreach=True) over our one stacked AdamW step.
Each number is the median of several rounds, ours and theirs taking turns, with the range in brackets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsim.optim import build
from fedsim.params import Layout

# Bytes per parameter that one pass must move in float32: x and each changed state read and written, g read.
BYTES = {
    "sgd": 12,
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
    "lamb": 40,
    "adamp": 40,
    "stable_spam": 36,
}
SPECS = {"momentum": {"name": "sgd", "momentum": 0.9}}
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


def compare(ours: Callable[[], object], theirs: Callable[[], object], budget: float = 0.1) -> dict[str, object]:
    """Median seconds of both and the ratio of each round, taking turns."""
    ours(), theirs()
    repeats = max(1, int(budget / max(once(theirs, 2), 1e-7) / 4))
    rounds = [(once(ours, repeats), once(theirs, repeats)) for _ in range(7)]
    ratios = [a / b for a, b in rounds]
    return {
        "ours_us": statistics.median(a for a, _ in rounds) * 1e6,
        "theirs_us": statistics.median(b for _, b in rounds) * 1e6,
        "ratio": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
    }


def our_step(rule: str, x: Tensor, g: Tensor, layout: Layout, backend: str) -> Callable[[], None]:
    spec = {"name": rule, **SPECS.get(rule, {}), "lr": LR, "weight_decay": 0.01, "backend": backend}
    if rule in ("sgd", "momentum"):
        spec["weight_decay"] = 0.0
    optimizer = build(spec, layout)
    state = optimizer.init(x)
    return lambda: optimizer.step_(x, g, state)


def fused(rule: str, x: Tensor, g: Tensor) -> Callable[[], object]:
    p = nn.Parameter(x.reshape(-1).clone())
    p.grad = g.reshape(-1)
    if rule == "sgd":
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default=",".join(BYTES))
    parser.add_argument("--clients", default="1,10,100")
    parser.add_argument("--sizes", default="10000,1000000")
    parser.add_argument("--compiled", action="store_true", help="time the compiled back end too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-entries", type=int, default=20_000_000, help="leave out larger stacks (memory)")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s)")
    print(f"{'rule':20} {'backend':9} {'C':>4} {'P':>8} {'ours us':>10} {'theirs us':>10} ratio [range] target")
    for size in map(int, args.sizes.split(",")):
        for clients in map(int, args.clients.split(",")):
            if size * clients > args.max_entries:
                continue
            layout = layout_of(size)
            generator = torch.Generator().manual_seed(0)
            x = torch.rand(clients, layout.size, generator=generator).to(args.device)
            g = torch.rand(clients, layout.size, generator=generator).to(args.device)
            for rule in args.rules.split(","):
                own = rule in ("sgd", "momentum", "adamw")
                theirs = fused(rule if own else "adamw", x, g)
                for backend in ("auto", "compiled") if args.compiled else ("auto",):
                    result = compare(our_step(rule, x, g, layout, backend), theirs)
                    target = 1.15 if own else 1.4 * BYTES[rule] / BYTES["adamw"]
                    rows.append({"rule": rule, "backend": backend, "C": clients, "P": size, "target": target, **result})
                    show(rows[-1])
            if clients > 1 and size <= 100_000:
                result = compare(separate_clients(x, g, layout), our_step("adamw", x, g, layout, "auto"))
                swapped = {**result, "ours_us": result["theirs_us"], "theirs_us": result["ours_us"]}
                rows.append(
                    {"rule": "adamw, clients", "backend": "auto", "C": clients, "P": size, "target": 5.0, **swapped}
                )
                show(rows[-1])
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


def show(row: dict[str, object]) -> None:
    low, high = row["range"]  # type: ignore[misc]
    print(
        f"{row['rule']:20} {row['backend']:9} {row['C']:4} {row['P']:8} {row['ours_us']:10.0f} {row['theirs_us']:10.0f}"
        f" {row['ratio']:6.2f} [{low:.2f}-{high:.2f}] {row['target']:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
