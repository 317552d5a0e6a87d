"""How fast are the rules that look at many long vectors?

`python -m benchmarks.bench_aggregate [--rows n] [--entries P]`: first nearest-neighbour averaging for all n clients,
whose distances a plain version would take with torch.cdist without matrix products; then rules of the table on the same
rows, beside ByzFL where it is installed (`--byzfl numpy torch` is what it is given). Seconds, the best of the repeats;
last the greatest memory of the process after ours, in times the rows.
"""

from __future__ import annotations

import argparse
import resource
import sys
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_compress import seconds
from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS, nearest_neighbour_average
from fedsim.graph import everybody


def plain(pivot: Tensor, sent: Tensor, heard: Tensor, keep: int) -> Tensor:
    """Nearest-neighbour averaging as one would write it first."""
    distances = torch.cdist(pivot, sent, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(~heard, torch.inf).argsort(dim=1, stable=True)[:, :keep]
    return torch.stack([sent[rows].mean(dim=0) for rows in nearest])


BYZFL = {
    "mean": ("Average", {}),
    "median": ("Median", {}),
    "trimmed_mean": ("TrMean", {"f": 1}),
    "krum": ("Krum", {"f": 1}),
    "multi_krum": ("MultiKrum", {"f": 1}),
    "geometric_median": ("GeometricMedian", {"nu": 0.1, "T": 3}),
    "nna": ("MoNNA", {"f": 1}),
    "nnm": ("NNM", {"f": 1}),
}
"""What ByzFL calls the same, with its settings; `f` stands for the number of faulty rows."""


def ours(name: str, f: int, v: Tensor) -> Any:
    """A rule or a pre-aggregator with no arguments left."""
    made = {**AGGREGATORS, **PRE_AGGREGATORS}[name]
    fields = made.__dataclass_fields__
    rule = made(**({"f": f} if "f" in fields else {}), **({"iterations": 3} if name == "geometric_median" else {}))
    more = (np.random.default_rng(0),) if name in PRE_AGGREGATORS else ()
    return lambda: rule(v, torch.ones(len(v), device=v.device), *more)


def theirs(name: str, f: int, v: Any) -> Any:
    """The same of ByzFL, which imports torchvision for a part that is not used here."""
    for part in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.models"):
        sys.modules.setdefault(part, MagicMock())
    import byzfl

    kind, given = BYZFL[name]
    rule = getattr(byzfl, kind)(**({**given, "f": f} if "f" in given else given))
    return lambda: rule(v)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rules", nargs="*", default=list(BYZFL))
    parser.add_argument("--byzfl", nargs="*", default=[], choices=["numpy", "torch"])
    args = parser.parse_args()
    n, f = args.rows, args.rows // 10
    v = (1.0 + 0.01 * torch.randn(n, args.entries, generator=torch.Generator().manual_seed(0))).to(args.device)
    heard = torch.ones(n, n, dtype=torch.bool, device=args.device)
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None

    print(f"{n} rows of {args.entries} entries, {args.device}, {torch.get_num_threads()} thread(s)")
    fast = seconds(lambda: (nearest_neighbour_average(v, v, everybody(n).to(v.device), n - f), wait()), args.repeats)
    slow = seconds(lambda: (plain(v, v, heard, n - f), wait()), 1)
    print(f"nna for all clients: {fast:.2f} s; plain cdist version: {slow:.2f} s; {slow / fast:.1f} times faster")
    found = {}
    for name in args.rules:
        rule = ours(name, f, v)
        found[name] = seconds(lambda r=rule: (r(), wait()), args.repeats)  # type: ignore[misc]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / v.nbytes
    for name in args.rules:
        line = f"{name:<20}{found[name]:>8.2f} s"
        for form in args.byzfl:
            rule = theirs(name, f, v.numpy() if form == "numpy" else v)
            took = seconds(lambda r=rule: (r(), wait()), 1)  # type: ignore[misc]
            line += f"; byzfl on {form} {took:>8.2f} s, {took / found[name]:.1f} times as long"
        print(line, flush=True)
    print(f"greatest memory after ours: {peak:.1f} times the rows")


if __name__ == "__main__":
    main()
