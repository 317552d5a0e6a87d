"""Data sets from what people have: data frames, dictionaries of columns, Hugging Face's and torch's data sets.

Letters: n samples, d columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.arrays import from_arrays
from fedsim.data.dataset import Dataset

Names = str | Sequence[str]


def from_table(
    table: Any,
    target: Names | None,
    *,
    features: Names | None = None,
    client: str | None = None,
    test: Any = None,
    origin: str = "table",
    **more: Any,
) -> Dataset:
    """A data set from columns by name.

    Args:
        table: a pandas DataFrame, a Hugging Face Dataset, or a mapping of arrays.
        target: the column of targets, or several columns of numbers; None where they are the next tokens.
        features: one column, whose rows are the samples; or several. By default all others. Several that hold a number
            each become a vector [d] of measurements; otherwise samples are dictionaries with an entry for each.
        client: the column of client keys. If `test` has it, too, its rows are what these clients hold out.
        test: a table of held-out rows with the same columns.
        origin: what messages call it.
        more: `num_classes`, `test_fraction`, `images` of `from_arrays`.

    Raises:
        ValueError: if a column is missing or does not hold numbers.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"age": [40, 50], "weight": [70.5, 80], "price": [1.5, 2.5], "clinic": ["a", "b"]})
    >>> data = from_table(frame, "price", client="clinic", test_fraction=0.0)
    >>> data.inputs.tolist(), data.targets.tolist(), data.group_names
    ([[40.0, 70.5], [50.0, 80.0]], [1.5, 2.5], ('a', 'b'))
    """
    x, y = sides(table, target, features, client, origin)
    held = (None, None) if test is None else sides(test, target, features, client, f"{origin}: test rows")
    keys = None if client is None else _column(table, client, origin)
    shared = client is not None and test is not None and client in _names(test)
    held_by = _column(test, client, origin) if shared and client is not None else None
    return from_arrays(x, y, *held, clients=keys, test_clients=held_by, origin=origin, **more)


def from_samples(
    samples: Any,
    test: Any = None,
    *,
    target: str = "labels",
    clients: object = None,
    origin: str = "data set",
    **more: Any,
) -> Dataset:
    """A data set from a torch Dataset, read once from its first sample to its last.

    Args:
        samples: gives (inputs, target), or dictionaries of which one entry is the target; `len` says how many.
        test: the same of held-out rows.
        target: the entry of targets in a dictionary; the next tokens are where there is none.
        clients: [n] keys of the natural clients.
        origin: what messages call it.
        more: `test_clients`, `num_classes`, `test_fraction` of `from_arrays`.

    Raises:
        ValueError: if samples differ in shape, or are something else.
    """
    held = (None, None) if test is None else _collated(test, target, f"{origin}: test rows")
    return from_arrays(*_collated(samples, target, origin), *held, clients=clients, origin=origin, **more)


def _collated(samples: Any, target: str, origin: str) -> tuple[Any, Any]:
    """(inputs, targets) of all samples."""
    try:
        found = torch.utils.data.default_collate([samples[i] for i in range(len(samples))])
    except (TypeError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{origin}: its samples can't be put side by side ({str(error).partition(chr(10))[0]}); give all of them "
            "the same shape, and numbers or tensors"
        ) from None
    if isinstance(found, Mapping):
        rest = {name: values for name, values in found.items() if name != target}
        return rest, found.get(target)
    if isinstance(found, list | tuple) and len(found) == 2:
        return found[0], found[1]
    raise ValueError(f"{origin}: a sample is a {type(samples[0]).__name__}; give (inputs, target) or a dictionary")


def sides(table: Any, target: Names | None, features: Names | None, client: str | None, origin: str) -> tuple[Any, Any]:
    """(inputs, targets) of a table, as `from_table` says."""
    aims = [] if target is None else [target] if isinstance(target, str) else list(target)
    columns = {name: _column(table, name, origin) for name in aims}
    y = None if not aims else columns[aims[0]] if isinstance(target, str) else np.stack(list(columns.values()), axis=1)
    if isinstance(features, str):
        return _column(table, features, origin), y
    chosen = list(features) if features else [name for name in _names(table) if name not in (*aims, client)]
    if not chosen:
        raise ValueError(f"{origin}: no column is left for features; it has {', '.join(_names(table))}")
    parts = {name: _column(table, name, origin) for name in chosen}
    if any(part.ndim != 1 for part in parts.values()):
        return parts, y
    for name, part in parts.items():
        if part.dtype.kind not in "fiub":
            raise ValueError(f"{origin}: column '{name}' holds {part.dtype}, not numbers; drop it or encode it")
    return np.stack([part.astype(np.float32) for part in parts.values()], axis=1), y


def _names(table: Any) -> list[str]:
    """The columns' names."""
    if isinstance(table, Mapping):
        return [str(name) for name in table]
    names = getattr(table, "column_names", None)  # of Hugging Face's; a DataFrame has `columns`
    return [str(name) for name in (getattr(table, "columns", ()) if names is None else names)]


def _column(table: Any, name: str, origin: str) -> np.ndarray:
    """One column as an array."""
    names = _names(table)
    if not names:
        raise ValueError(f"{origin}: expected a DataFrame, a Hugging Face Dataset or a mapping of columns")
    if name not in names:
        raise ValueError(f"{origin}: no column '{name}', it has {', '.join(names)}; name one of these")
    if not isinstance(table, Mapping) and hasattr(table, "with_format"):
        values = table.select_columns([name]).with_format("numpy")[:][name]
    else:
        values = table[name]
    return values.numpy() if isinstance(values, Tensor) else np.asarray(values)
