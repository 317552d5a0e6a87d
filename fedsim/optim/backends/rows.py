"""A stack cut into blocks of rows, each looked through for gradients that are not finite before it is stepped.

Letters: k clients, P coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from fedsim.optim.groups import Recipe, Values
from fedsim.optim.step import Block

_DECODED_ENTRIES = 1 << 26  # on a GPU: 256 MB


def by_rows(
    recipe: Recipe, x: Tensor, g: Tensor, block: Block, entries: int, run: Callable[[Tensor, Tensor, Block], None]
) -> list[int]:
    """Run a step on blocks of rows of about so many entries (on a CPU); returns the rows that were left out."""
    k, left, checked = len(x), [], recipe.settings.skip_nonfinite
    states = [own | group.weights(x) for own, group in zip(block.states, recipe.groups, strict=True)]
    block = replace(block, states=states)
    for rows in row_blocks(x, entries, recipe.decodes):
        bad = None
        if checked and block.doubt is not None:
            block.doubt.add_(g[rows].sum())
        elif checked:
            bad = _not_finite(g[rows])
        if bad is None:
            run(x[rows], g[rows], take_rows(block, rows, k))
            continue
        left += (np.flatnonzero(bad) + rows.start).tolist()
        for some in _runs(~bad, rows.start):
            run(x[some], g[some], take_rows(block, some, k))
    return left


def row_blocks(x: Tensor, entries: int, decodes: bool = False) -> list[slice]:
    """The rows that are worked on together; `decodes` bounds the room of decoded states where all rows would be."""
    k, width = x.shape
    if x.device.type == "cpu":
        step = max(1, entries // width)
    else:
        step = max(1, _DECODED_ENTRIES // width) if decodes else k
    return [slice(i, min(i + step, k)) for i in range(0, k, step)]


def take_rows(block: Block, rows: slice, k: int) -> Block:
    """The part of a block that belongs to some of its k rows."""
    if rows.start == 0 and rows.stop == k:
        return block

    def pick(values: Values) -> Values:
        return {
            n: v[rows] if isinstance(v, Tensor) and v.ndim == 2 and len(v) == k > 1 else v for n, v in values.items()
        }

    return block.map(pick)


def _not_finite(grad: Tensor) -> np.ndarray | None:
    """[k] bool, which rows hold an entry that is not finite; None if none does (the cheap answer)."""
    if isfinite(grad.sum().item()):
        return None
    bad = ~torch.isfinite(grad).all(1)  # a sum of large entries may overflow: look closer
    return bad.cpu().numpy() if bool(bad.any()) else None


def _runs(keep: np.ndarray, start: int) -> list[slice]:
    """The runs of consecutive rows that are kept, numbered from `start`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]])))
    return [slice(start + int(a), start + int(b)) for a, b in edges.reshape(-1, 2)]
