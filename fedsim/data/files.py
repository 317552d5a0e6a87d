"""The user's own data in files: `.npz` or Parquet, one file or one file per client.

Letters: n samples.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data.arrays import from_arrays
from fedsim.data.checks import as_inputs, as_targets, one_line
from fedsim.data.dataset import Dataset, row
from fedsim.data.tables import sides
from fedsim.trees import one


@dataclass(frozen=True)
class _Table:
    """Arrays of one file; all but the first two may be missing."""

    x: np.ndarray
    y: np.ndarray
    clients: np.ndarray | None = None
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    test_clients: np.ndarray | None = None


def npz(
    *,
    path: str,
    root: str | None = None,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
    images: bool = False,
) -> Dataset:
    """Your own arrays: an .npz file with x, y and perhaps client, x_test, y_test, or a folder with a file per client.

    In a folder every `NAME.npz` with x and y is the client NAME, and `test.npz`, if there is one, is held out; a client
    whose file has x_test and y_test holds these out itself; in a single file `client_test` names the client of each row
    of x_test. Floating-point and uint8 x is taken as it is, other integers are tokens; integer y are classes or tokens,
    others are numbers.

    Args:
        path: the file or folder; relative to `root` where that is given and has it.
        root: the folder of the configuration's `data.root`.
        num_classes: by default one more than the largest label.
        test_fraction: the share held out, class by class, when the files hold no test rows.
        images: x holds pixels of type uint8, to be divided by 255.

    Raises:
        ValueError: naming the file and the key that is missing or does not fit.
    """
    return _load(_resolve(path, root), ".npz", _read_npz, num_classes, test_fraction, images)


def parquet(
    *,
    path: str,
    root: str | None = None,
    label: str | tuple[str, ...] = "label",
    client: str = "client",
    features: str | None = None,
    shape: tuple[int, ...] | None = None,
    test_path: str | None = None,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
    images: bool = False,
) -> Dataset:
    """Your own table: a Parquet file with label, features and perhaps client, or a folder with a file per client.

    In a folder every `NAME.parquet` is the client NAME, and `test.parquet`, if there is one, is held out.

    Args:
        path, root, num_classes, test_fraction: as for `npz`.
        label: the column of targets: classes (integers from 0) or numbers; or several such columns.
        client: the column of client keys; in a single file it may be missing. Held-out rows that have it are held out
            by these clients.
        features: one column that holds a list per row: floating-point numbers or uint8, taken as they are, or tokens
            (other integers). By default all other columns, each of them one measurement.
        shape: of one sample, such as [1, 28, 28]; by default a vector.
        test_path: a file of held-out rows with the same columns.
        images: the column `features` holds pixels of type uint8, to be divided by 255.

    Raises:
        ValueError: naming the file and the column that is missing or does not fit.
    """
    read = partial(_read_table, label=label, client=client, features=features, shape=shape)
    test = None if test_path is None else _resolve(test_path, root)
    return _load(_resolve(path, root), ".parquet", read, num_classes, test_fraction, images, test)


def csv(
    *,
    path: str,
    root: str | None = None,
    label: str | tuple[str, ...] = "label",
    client: str = "client",
    test_path: str | None = None,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
) -> Dataset:
    """Your own table: a CSV file with label, numbers and perhaps client, or a folder with a file per client.

    In a folder every `NAME.csv` is the client NAME, and `test.csv`, if there is one, is held out. The first line names
    the columns.

    Args:
        path, root, num_classes, test_fraction: as for `npz`.
        label, client, test_path: as for `parquet`.

    Raises:
        ValueError: naming the file and the column that is missing or does not fit.
    """
    read = partial(_read_table, label=label, client=client, features=None, shape=None)
    test = None if test_path is None else _resolve(test_path, root)
    return _load(_resolve(path, root), ".csv", read, num_classes, test_fraction, False, test)


def _resolve(path: str, root: str | None) -> Path:
    candidates = [*([Path(root) / path] if root else []), Path(path)]
    found = next((p for p in candidates if p.exists()), None)
    if found is None:
        raise ValueError(
            f"no file or folder {' or '.join(map(str, candidates))}; correct the path, or name the "
            f"folder it lies in as data.root"
        )
    return found


def _load(
    path: Path,
    suffix: str,
    read: Callable[[Path], _Table],
    num_classes: int | None,
    test_fraction: float,
    images: bool,
    test_file: Path | None = None,
) -> Dataset:
    table = _read_folder(path, suffix, partial(_read, read=read)) if path.is_dir() else _read(path, read)
    if test_file is not None:
        held = _read(test_file, read)
        owners = None if table.clients is None else held.clients
        table = replace(table, x_test=held.x, y_test=held.y, test_clients=owners)
    return from_arrays(
        table.x,
        table.y,
        table.x_test,
        table.y_test,
        clients=table.clients,
        test_clients=table.test_clients,
        num_classes=num_classes,
        test_fraction=test_fraction,
        images=images,
        origin=str(path),
    )


def _read(file: Path, read: Callable[[Path], _Table]) -> _Table:
    """A table of a file; reading a named pipe would wait for whoever writes to it, and not twice."""
    if not file.is_file():
        raise ValueError(f"{file}: is no regular file; write the data to one")
    return read(file)


def _read_folder(folder: Path, suffix: str, read: Callable[[Path], _Table]) -> _Table:
    files = sorted(file for file in folder.glob(f"*{suffix}") if file.stem != "test")
    if not files:
        raise ValueError(f"{folder}: no *{suffix} files in this folder; put one file per client there, named after it")
    tables: list[_Table] = []
    first = ""
    for file in files:
        table = read(file)
        # converted here already, so that a message names the client's own file
        x, y = as_inputs(table.x, f"{file}: inputs"), as_targets(table.y, f"{file}: labels")
        if len(one(x)) != len(one(y)):
            raise ValueError(f"{file}: {len(one(x))} inputs but {len(one(y))} labels; one label per row is needed")
        rows = row(x, y)
        first = first or rows
        if rows != first:
            raise ValueError(f"{file}: rows are {rows}, but {files[0].name} has {first}; every client needs the same")
        tables.append(replace(table, y=one(y).numpy()))
    names = [file.stem for file in files]
    clients = np.repeat(names, [len(table.x) for table in tables])
    pooled = _Table(np.concatenate([t.x for t in tables]), np.concatenate([t.y for t in tables]), clients)
    held = folder / f"test{suffix}"
    own = [(name, t.x_test, t.y_test) for name, t in zip(names, tables, strict=True) if t.x_test is not None]
    if own and held.exists():
        raise ValueError(f"{held}: clients' own files hold x_test already; take one of the two away")
    if own:
        owners = np.repeat([name for name, *_ in own], [len(x) for _, x, _ in own])
        x_test, y_test = (np.concatenate([part[i] for part in own]) for i in (1, 2))
        return replace(pooled, x_test=x_test, y_test=y_test, test_clients=owners)
    if not held.exists():
        return pooled
    test = read(held)
    return replace(pooled, x_test=test.x, y_test=test.y)


def _read_npz(file: Path) -> _Table:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: not an .npz archive, or cut short; write it with numpy.savez(file, x=..., y=...)")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {
                key: archive[key] for key in ("x", "y", "client", "x_test", "y_test", "client_test") if key in archive
            }
            keys = ", ".join(archive)
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file}: cannot be read as .npz ({error}); write it with numpy.savez(file, x=..., y=...), without objects"
        ) from None
    for key in ("x", "y"):
        if key not in arrays:
            raise ValueError(
                f"{file}: no key '{key}', it has {keys or 'none'}; save with numpy.savez(file, x=..., y=...)"
            )
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{file}: x_test and y_test must be there together, it has {keys}")
    rest = (arrays.get(key) for key in ("client", "x_test", "y_test", "client_test"))
    return _Table(arrays["x"], arrays["y"], *rest)


def _read_table(
    file: Path, label: str | tuple[str, ...], client: str, features: str | None, shape: tuple[int, ...] | None
) -> _Table:
    table = _arrow(file)
    labels = (label,) if isinstance(label, str) else label
    for name in table.column_names if features is None else (*labels, features):
        if name != client and name in table.column_names and (missing := table[name].null_count):
            first = int(np.flatnonzero(table[name].is_null().to_numpy())[0])
            raise ValueError(
                f"{file}: column '{name}' has {missing} missing values, the first in row {first}; fill or drop them"
            )
    columns = {name: table[name].to_numpy() for name in table.column_names if name != features}
    if features in table.column_names:
        columns[features] = _list_column(table[features].combine_chunks(), f"{file}: column '{features}'")
    x, y = sides(columns, label, features, client, str(file))
    if shape is not None:
        if min(shape, default=0) < 1 or int(np.prod(shape)) != x.shape[1]:
            raise ValueError(f"{file}: {x.shape[1]} numbers per row do not fill task.dataset.shape={list(shape)}")
        x = x.reshape(len(x), *shape)
    return _Table(x, y, columns.get(client))


def _arrow(file: Path) -> Any:
    """The pyarrow table of a Parquet or CSV file."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    kind = "CSV" if file.suffix == ".csv" else "Parquet"
    try:
        return pyarrow.csv.read_csv(file) if kind == "CSV" else pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{file}: cannot be read as {kind} ({one_line(error)}); write it again, or correct the path"
        ) from None


def _list_column(column: object, what: str) -> np.ndarray:
    """A column of equally long lists of numbers as [n, d]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type  # type: ignore[attr-defined]
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise ValueError(f"{what}: expected a list of numbers per row, got {kind}; leave features out to use columns")
    lengths = pc.list_value_length(column)
    shortest, longest = pc.min(lengths).as_py(), pc.max(lengths).as_py()
    if shortest != longest:
        raise ValueError(f"{what}: lists have {shortest} to {longest} entries; give every row the same length")
    values = column.flatten()  # type: ignore[attr-defined]
    if values.null_count:
        raise ValueError(f"{what}: {values.null_count} missing values in the lists; fill or drop them")
    return values.to_numpy(zero_copy_only=False).reshape(len(lengths), longest or 0)
