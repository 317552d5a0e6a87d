"""Arrays that come from outside: turned into tensors of the expected types, or refused in one sentence.

Letters: n samples, T length of a sequence.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fedsim.trees import Tree, tensors

_ROWS = 1 << 16  # rows looked at together when searching for NaN


def as_inputs(array: object, origin: str, images: bool = False) -> Tree:
    """Inputs as float32, or int64 where they are tokens; a dictionary of them entry by entry.

    Floating-point, boolean and uint8 arrays become float32 as they are; every other integer type is read as tokens. In
    a dictionary, booleans stay what they are (masks) and a row may hold a single number.

    Args:
        array: [n, ...], a tensor, a numpy array (which may be a memory map) or nested lists of numbers, or several of
            these by name.
        origin: where it came from (file and key), for the message.
        images: they are pixels of type uint8, to be divided by 255.

    Raises:
        ValueError: if it does not hold finite numbers, a row holds a single bare number, or images are not uint8.
    """
    if isinstance(array, Mapping):
        return _by_name(lambda part, where: _input(_numeric(part, where, "numbers"), where, masks=True), array, origin)
    values = _numeric(array, origin, "numbers")
    if values.ndim < 2:
        raise ValueError(
            f"{origin}: expected one row per sample, [n, ...], got shape {list(values.shape)}; reshape a single "
            f"feature to [n, 1]"
        )
    if images:
        if values.dtype != np.uint8:
            raise ValueError(
                f"{origin}: images are pixels of type uint8, these are {values.dtype}; convert or scale them"
            )
        return torch.from_numpy(values.astype(np.float32) / 255)
    return _input(values, origin)


def as_targets(array: object, origin: str) -> Tree:
    """Targets as int64 where they are integers (classes, tokens), else float32; a dictionary entry by entry.

    Raises:
        ValueError: if they are no finite numbers.
    """
    if isinstance(array, Mapping):
        return _by_name(as_targets, array, origin)
    values = _numeric(array, origin, "integer classes or numbers")
    if not values.ndim:
        raise ValueError(f"{origin}: expected one target per row, [n, ...], got a single number")
    return check_finite(_tensor(values, np.int64 if values.dtype.kind in "iub" else np.float32), origin)


def _by_name(read: Callable[[object, str], Tree], arrays: Mapping[str, object], origin: str) -> dict[str, Tensor]:
    """A dictionary of tensors that have the same rows."""
    found = {}
    for name, array in arrays.items():
        part = read(array, f"{origin} '{name}'")
        assert isinstance(part, Tensor)
        found[str(name)] = part
    check_rows(found, origin)
    return found


def _input(values: np.ndarray, origin: str, masks: bool = False) -> Tensor:
    kind: type = np.int64 if values.dtype.kind in "iu" and values.dtype != np.uint8 else np.float32
    return check_finite(_tensor(values, np.bool_ if masks and values.dtype.kind == "b" else kind), origin)


def _tensor(values: np.ndarray, kind: type) -> Tensor:
    """The same numbers as a tensor, which shares their memory where it can."""
    ready = np.require(values, dtype=kind, requirements=["C"])
    if not ready.flags.writeable and not isinstance(ready, np.memmap):
        ready = ready.copy()
    with warnings.catch_warnings():  # a file that is mapped to be read is only read: nothing writes to samples
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(ready)


def check_rows(tree: Tree, origin: str) -> int:
    """How many rows all tensors of it have.

    Raises:
        ValueError: if there are none, or they differ.
    """
    lengths = {name: len(t) if t.ndim else 0 for name, t in tensors(tree).items()}
    if not lengths:
        raise ValueError(f"{origin}: there is nothing in this dictionary; give at least one array")
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"'{name}' {n}" for name, n in lengths.items())
        raise ValueError(f"{origin}: every entry needs one row per sample, but there are {found}")
    return next(iter(lengths.values()))


def check_finite(x: Tensor, what: str) -> Tensor:
    """The tensor itself.

    Raises:
        ValueError: naming the first row with NaN or infinity.
    """
    if not x.is_floating_point() or not x.numel():
        return x
    low, high = x.aminmax()  # one cheap pass; NaN wins over every number
    if torch.isfinite(low) and torch.isfinite(high):
        return x
    for first in range(0, len(x), _ROWS):
        finite = torch.isfinite(x[first : first + _ROWS]).view(len(x[first : first + _ROWS]), -1).all(1)
        if not finite.all():
            bad = first + int((~finite).nonzero()[0])
            raise ValueError(f"{what}: row {bad} holds NaN or infinity; drop the row or fill the gap before training")
    raise AssertionError("what is not finite lies in some row")


def _numeric(array: object, origin: str, wanted: str) -> np.ndarray:
    try:
        values = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asanyarray(array)
    except (ValueError, TypeError) as error:  # ragged lists, bfloat16
        raise ValueError(f"{origin}: cannot be read as an array ({error}); give every row the same shape") from None
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{origin}: expected {wanted}, got type {values.dtype}; convert it before saving")
    return values


def as_keys(array: object, rows: int, origin: str) -> tuple[Tensor, tuple[str, ...]]:
    """Client keys, [n] integers or strings, as numbers 0..G-1 in sorted order, with their names.

    >>> as_keys(["bob", "ann", "bob"], 3, "here")
    (tensor([1, 0, 1]), ('ann', 'bob'))
    """
    keys = array.cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if keys.dtype.kind == "O" and all(isinstance(key, str) for key in keys.flat):
        keys = keys.astype(str)
    if keys.dtype.kind not in "iubUS":
        raise ValueError(f"{origin}: client keys must be integers or strings without gaps, got type {keys.dtype}")
    if keys.shape != (rows,):
        raise ValueError(f"{origin}: expected one client key for each of {rows} rows, got shape {list(keys.shape)}")
    names, codes = np.unique(keys, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), tuple(str(name) for name in names)


def one_line(error: Exception) -> str:
    """An exception's text without line breaks, for use inside a message."""
    return " ".join(str(error).split())


def check_alpha(name: str, alpha: float) -> None:
    """Refuse a concentration that is negative or not finite."""
    if not 0 <= alpha < np.inf:
        raise ValueError(f"{name}.alpha must be 0 or more and finite, got {alpha}; for equal shares choose iid")


def check_least(where: str, least: int, **values: float) -> None:
    """Refuse numbers below their least value; `where` is what a message puts in front of their names."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{where}{name} must be {least} or more, got {value}")


def check_fraction(name: str, value: float) -> None:
    """Refuse a share that is not in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}; 0 holds out nothing")
