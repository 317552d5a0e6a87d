"""How fast do compressors encode and decode a stack? `python -m benchmarks.bench_compress [--rows C] [--entries P]`.

MB/s of uncompressed float32, the best of several repeats on one thread unless OMP_NUM_THREADS says otherwise; `write`
and `read` are of one row's bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from fedsim.compress import COMPRESSORS
from fedsim.compress.packet import Packet
from fedsim.compress.quantize import QSGD
from fedsim.compress.sparsify import TopK
from fedsim.params import Layout
from fedsim.streams import Streams


def settings(num_entries: int) -> dict[str, object]:
    """One usual setting of every compressor in the table."""
    layout = Layout.of({"w": (num_entries // 1000, 1000), "b": (num_entries % 1000,)})
    fields: dict[str, dict[str, object]] = {
        "rand_k": {"fraction": 0.01},
        "top_k": {"fraction": 0.01},
        "bernoulli": {"p": 0.1},
        "qsgd": {"levels": 7},
        "adaptive_qsgd": {"levels": 7},
        "natural_dithering": {"levels": 7},
        "seeds": {"steps": 5},
        "composed": {"first": TopK(fraction=0.01), "then": QSGD(levels=7)},
        "per_tensor": {"of": TopK(fraction=0.01), "layout": layout},
        "powersgd": {"rank": 4, "layout": layout},
    }
    return {name: cls(**fields.get(name, {})) for name, cls in COMPRESSORS.items()}


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of some calls, after one to warm up."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    v = torch.randn(args.rows, args.entries, generator=torch.Generator().manual_seed(0)).to(args.device)
    ids = torch.arange(args.rows, device=args.device)
    streams = Streams(0, ids, torch.zeros_like(ids))
    megabytes = v.numel() * 4 / 1e6
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None

    print(f"{args.rows} rows of {args.entries} entries, {args.device}, {torch.get_num_threads()} thread(s)")
    print(
        f"{'compressor':<20}{'encode MB/s':>12}{'decode MB/s':>12}{'write MB/s':>12}{'read MB/s':>12}{'bits/entry':>12}"
    )
    for name, compressor in settings(args.entries).items():
        packet = compressor.encode(v, streams)  # type: ignore[attr-defined]
        data, shared = packet.encode_row(0), compressor.shared(streams.rows([0]), args.entries)  # type: ignore[attr-defined]
        rates = [
            megabytes / seconds(lambda c=compressor: (c.encode(v, streams), wait()), args.repeats),  # type: ignore[misc]
            megabytes / seconds(lambda p=packet: (p.decode(), wait()), args.repeats),  # type: ignore[misc]
            megabytes / args.rows / seconds(lambda p=packet: p.encode_row(0), args.repeats),  # type: ignore[misc]
            megabytes
            / args.rows
            / seconds(
                lambda c=compressor, d=data, s=shared: Packet.decode_row(d, c, args.entries, s),  # type: ignore[misc]
                args.repeats,
            ),
        ]
        shown = "".join(f"{rate:>12.0f}" for rate in rates)
        print(f"{name:<20}{shown}{compressor.bits(args.entries) / args.entries:>12.2f}")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
