"""Columns of a run's larger side files (per client, per job), read fast: a million rows take a second, not ten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def read_columns(folder: Path, stem: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Numeric columns of `stem`.jsonl in a folder.

    Returns:
        {name: [rows] float64, NaN for null} of those names that exist; empty if there is no such file, or no row.

    Raises:
        ValueError: if the file is there and cannot be read.
    """
    file = folder / f"{stem}.jsonl"
    if not file.is_file() or not file.stat().st_size:
        return {}
    import pyarrow
    import pyarrow.json

    try:
        table = pyarrow.json.read_json(file)
        found = [name for name in names if name in table.column_names]
        return {name: table[name].cast(pyarrow.float64()).to_numpy() for name in found}
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{file} cannot be read ({e}); remove it to write the report without it") from e
