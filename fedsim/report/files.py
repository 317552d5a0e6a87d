"""The side files of a run that its report reads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import numpy as np


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """What goes wrong inside is this file's fault, and a report can do without it."""
    try:
        yield
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, BadZipFile) as e:
        raise ValueError(f"{file} cannot be read ({e}); remove it to write the report without it") from e


def arrays(file: Path) -> dict[str, np.ndarray]:
    """{name: array} of an .npz file; read whole, since numpy leaves one open that is damaged."""
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
        return dict(stored)


def read_columns(folder: Path, stem: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Numeric columns of `stem`.jsonl in a folder.

    Returns:
        {name: [rows] float64, NaN for null} of those names that exist; empty if there is no such file, or no row.

    Raises:
        ValueError: if the file is there and cannot be read.
    """
    file = folder / f"{stem}.jsonl"
    if not file.is_file():
        return {}
    with reading(file):
        rows = json.loads(f"[{','.join(file.read_text(encoding='utf-8').splitlines())}]")  # at once: twice as fast
        found = [name for name in names if any(name in row for row in rows)]
        return {name: np.array([row.get(name) for row in rows], float) for name in found}
