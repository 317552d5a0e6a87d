"""Samples as pictures, for `Task.pictures`."""

from __future__ import annotations

from torch import Tensor


def grid(title: str, samples: Tensor, columns: int, low: float, high: float) -> dict[str, Tensor]:
    """Images side by side, row after row, under a title; nothing where samples are no images.

    Args:
        title: of the picture.
        samples: [k, height, width] or [k, 1 or 3, height, width]; k a multiple of `columns`, or what is beyond is cut.
        columns: of the grid.
        low, high: the numbers that are black and white.

    Returns:
        {title: [rows, columns, height, width, 1 or 3] in [0, 1]}.
    """
    if samples.ndim == 3:
        samples = samples[:, None]
    if samples.ndim != 4 or samples.shape[1] not in (1, 3) or not samples.is_floating_point():
        return {}
    columns = min(columns, len(samples))
    shown = samples[: len(samples) // columns * columns].movedim(1, -1).unflatten(0, (-1, columns))
    return {title: ((shown - low) / max(high - low, 1e-12)).clamp(0, 1)}
