"""How fast are the rules that look at many long vectors?

`python -m benchmarks.bench_aggregate [--rows n] [--entries P]`: first nearest-neighbour averaging for all n clients,
whose distances a plain version would take with torch.cdist without matrix products; then rules of the table on the same
rows. Seconds, the best of the repeats.
"""

from __future__ import annotations

import argparse
from inspect import signature

import torch
from torch import Tensor

from benchmarks.bench_compress import seconds
from fedsim.aggregate import AGGREGATORS, nearest_neighbour_average
from fedsim.graph import everybody


def plain(pivot: Tensor, sent: Tensor, heard: Tensor, keep: int) -> Tensor:
    """Nearest-neighbour averaging as one would write it first."""
    distances = torch.cdist(pivot, sent, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(~heard, torch.inf).argsort(dim=1, stable=True)[:, :keep]
    return torch.stack([sent[rows].mean(dim=0) for rows in nearest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rules", nargs="*", default=["mean", "median", "trimmed_mean", "krum", "geometric_median"])
    args = parser.parse_args()
    n, f = args.rows, args.rows // 10
    v = (1.0 + 0.01 * torch.randn(n, args.entries, generator=torch.Generator().manual_seed(0))).to(args.device)
    heard = torch.ones(n, n, dtype=torch.bool, device=args.device)
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None

    print(f"{n} rows of {args.entries} entries, {args.device}, {torch.get_num_threads()} thread(s)")
    ours = seconds(lambda: (nearest_neighbour_average(v, v, everybody(n).to(v.device), n - f), wait()), args.repeats)
    other = seconds(lambda: (plain(v, v, heard, n - f), wait()), 1)
    print(f"nna for all clients: {ours:.2f} s; plain cdist version: {other:.2f} s; {other / ours:.1f} times faster")
    for name in args.rules:
        rule = AGGREGATORS[name](**({"f": f} if "f" in signature(AGGREGATORS[name]).parameters else {}))
        took = seconds(lambda r=rule: (r(v, torch.ones(n, device=v.device)), wait()), args.repeats)  # type: ignore[misc]
        print(f"{name:<20}{took:>8.2f} s")


if __name__ == "__main__":
    main()
