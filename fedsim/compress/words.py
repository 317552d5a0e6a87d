"""Random words for compressors, a block of columns at a time.

A compressor draws one number an entry. Drawing them for a few thousand entries at once keeps everything in the cache,
several times faster than whole rows; the streams are counters, so a block's words are the same as the row's.

Letters: C clients in the stack, P entries, n words.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedsim.streams import Streams, mix64

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_BLOCK = 1 << 16  # entries of a block, over all rows: 256 KiB of random words


def words64(keys: Tensor, start: int, stop: int) -> Tensor:
    """[C, stop - start] int64: words start..stop-1 of the streams with these keys [C], every bit random."""
    return mix64(keys[:, None] + torch.arange(start + 1, stop + 1, device=keys.device) * _GOLDEN)


def blocks(v: Tensor, keys: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Walk over the columns of v [C, P] in blocks, with a random word for every entry.

    Yields:
        (columns, words [C, width] int32), the same words for an entry whatever the width of the blocks.
    """
    rows, total = v.shape
    # A GPU is best served by the whole stack at once; a cache is not.
    width = max(64, _BLOCK // max(1, rows)) // 2 * 2 if v.device.type == "cpu" else total + total % 2
    for start in range(0, total, width):
        stop = min(start + width, total)
        pairs = words64(keys, start // 2, (stop + 1) // 2).view(torch.int32)
        yield slice(start, stop), pairs[:, : stop - start]


def uniform(words: Tensor) -> Tensor:
    """Uniform numbers on [0, 1) from int32 words: 24 bits each, float32."""
    return ((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def sample(streams: Streams, num_entries: int, k: int, purpose: str, step: int = 0) -> Tensor:
    """k different numbers among 0..num_entries-1 for each client, every set equally likely.

    Few out of many are drawn with replacement until k different ones have come, which takes time in k and not in P.

    Returns:
        [C, k] int64, ascending.
    """
    keys = streams.keys(purpose, step)
    if 8 * k > num_entries:
        ranks = words64(keys, 0, num_entries)
        return torch.topk(ranks, k, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
    num_draws = k + k // 8 + 16
    while True:
        draws = (words64(keys, 0, num_draws) & (2**63 - 1)).remainder(num_entries)  # uneven by P / 2^63 at most
        first, enough = _first_of_each(draws, k)
        if enough:
            return draws[first].view(-1, k).sort(dim=1).values
        num_draws *= 2  # a longer prefix of the same streams: rows that had enough keep their choice


def _first_of_each(draws: Tensor, k: int) -> tuple[Tensor, bool]:
    """Marks each row's first k draws that no earlier draw of the row equals, and whether every row has k."""
    ordered, order = draws.sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    fresh = torch.empty_like(new).scatter_(1, order, new)
    count = fresh.cumsum(dim=1)
    return fresh & (count <= k), bool((count[:, -1] >= k).all())
