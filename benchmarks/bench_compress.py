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
from fedsim.compress.packet import Compressor, Packet
from fedsim.compress.quantize import QSGD
from fedsim.compress.sparsify import TopK
from fedsim.params import Layout
from fedsim.streams import Streams


def settings(num_entries: int) -> dict[str, Compressor]:
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

    print(f"{args.rows} rows of {args.entries} entries, {args.device}, {torch.get_num_threads()} thread(s)")
    heads = ("encode MB/s", "decode MB/s", "write MB/s", "read MB/s", "bits/entry")
    print(f"{'compressor':<20}{''.join(f'{head:>12}' for head in heads)}")
    for name, compressor in settings(args.entries).items():
        rates = measured(compressor, v, streams, args.repeats)
        shown = "".join(f"{rate:>12.0f}" for rate in rates)
        print(f"{name:<20}{shown}{compressor.bits(args.entries) / args.entries:>12.2f}")


def measured(compressor: Compressor, v: torch.Tensor, streams: Streams, repeats: int) -> list[float]:
    """MB/s of encoding and decoding the stack [C, P], and of writing and reading a row of it."""
    wait = torch.cuda.synchronize if v.is_cuda else lambda: None
    packet, entries, row = compressor.encode(v, streams), v.shape[1], v.shape[1] * 4 / 1e6
    data, shared = packet.encode_row(0), compressor.shared(streams.rows([0]), entries)
    return [
        len(v) * row / seconds(lambda: (compressor.encode(v, streams), wait()), repeats),
        len(v) * row / seconds(lambda: (packet.decode(), wait()), repeats),
        row / seconds(lambda: packet.encode_row(0), repeats),
        row / seconds(lambda: Packet.decode_row(data, compressor, entries, shared), repeats),
    ]


if __name__ == "__main__":
    main()
