"""How the data was split: a client-by-class picture, sizes, and how mixed each client's classes are.

Letters: N clients, K classes. Few clients are all shown; of many, evenly spaced ones, and the distributions of all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsim.report.draw import heat_map, histogram
from fedsim.report.files import arrays, reading
from fedsim.report.page import Picture, Section

SHOWN_CLIENTS = 200
SAMPLED_CLIENTS = 100
SHOWN_CLASSES = 100


def split_section(folder: Path) -> Section | None:
    """The section from `split.npz` (`counts` [N, K], perhaps `class_names` [K]), or None if there is none.

    Raises:
        ValueError: if the file is there and does not hold such counts.
    """
    file = folder / "split.npz"
    if not file.is_file():
        return None
    counts, names = _read(file)
    if not counts.size:
        return None
    sizes = counts.sum(1)
    pictures = [_heat_map(counts, names)]
    if len(counts) > 1:
        svg = histogram(sizes, x_label="examples", alt="number of clients by number of examples", whole=True)
        pictures.append(Picture(title="Clients by size", svg=svg))
    if len(counts) > 1 and counts.shape[1] > 1 and sizes.any():
        entropy = class_entropy(counts if sizes.all() else counts[sizes > 0])
        svg = histogram(entropy, x_label="class entropy (bit)", alt="number of clients by class entropy")
        pictures.append(Picture(title="Clients by mix of classes", svg=svg))
    return Section(title="How the data was split", text=_sentence(counts), pictures=pictures)


def class_entropy(counts: np.ndarray) -> np.ndarray:
    """[N] entropy in bits of each client's classes: 0 for one class, log2 K for all alike. Counts [N, K], no row empty.

    >>> class_entropy(np.array([[4, 0], [2, 2]]))
    array([0., 1.])
    """
    shares = counts / counts.sum(1, keepdims=True)
    return (shares * np.log2(1 / np.where(shares > 0, shares, 1))).sum(1)


def _read(file: Path) -> tuple[np.ndarray, list[str] | None]:
    with reading(file):
        stored = arrays(file)
        counts = stored["counts"]
        names = [str(name) for name in stored["class_names"]] if "class_names" in stored else None
        if counts.ndim != 2 or counts.dtype.kind not in "iuf" or (counts.size and not counts.min() >= 0):
            raise ValueError(f"counts must be [clients, classes] and not negative, got {counts.shape}")
        if names is not None and len(names) != counts.shape[1]:
            raise ValueError(f"{len(names)} class_names for {counts.shape[1]} classes")
    return counts, names


def _heat_map(counts: np.ndarray, names: list[str] | None) -> Picture:
    n, k = counts.shape
    whole = n <= SHOWN_CLIENTS
    shown = counts if whole else counts[np.linspace(0, n - 1, SAMPLED_CLIENTS).astype(int)]
    y_label = "class"
    if k > SHOWN_CLASSES:
        per_row = -(-k // SHOWN_CLASSES)
        shown = np.add.reduceat(shown, np.arange(0, k, per_row), axis=1)
        names, y_label = None, f"groups of {per_row} classes"
    if names is not None and k > 24:
        names = None  # names set this close would lie on top of one another
    x_label = "client" if whole else f"{SAMPLED_CLIENTS} of {n:,} clients, evenly spaced"
    alt = f"examples of each class (down) that {'each client' if whole else 'sampled clients'} (across) holds"
    svg = heat_map(shown, rows=names, x_label=x_label, y_label=y_label, alt=alt, ids=whole)
    return Picture(title="Examples per client, and their classes", svg=svg, wide=True)


def _sentence(counts: np.ndarray) -> str:
    sizes = counts.sum(1)
    n = len(sizes)
    text = f"{n:,} client{'s' * (n != 1)}, {sizes.sum():,.0f} examples, {counts.shape[1]:,} classes. "
    text += f"The median client holds {np.median(sizes):,.0f} ({sizes.min():,.0f} to {sizes.max():,.0f})"
    held = np.count_nonzero(counts, axis=1)[sizes > 0]
    text += f" of {np.median(held):,.0f} classes." if len(held) else "."
    empty = int((sizes == 0).sum())
    text += f" {empty:,} hold{'s' * (empty == 1)} none." if empty else ""
    return text + " A cell is the stronger, by the square root, the more examples it stands for."
