"""Arrays that come from outside: turned into tensors of the expected types, or refused in one sentence.

Letters: n samples, T length of a sequence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def as_inputs(array: object, origin: str, images: bool = False) -> Tensor:
    """Inputs as float32, or int64 where they are tokens.

    Floating-point, boolean and uint8 arrays become float32 as they are; every other integer type is read as tokens.

    Args:
        array: [n, ...], a tensor, a numpy array or nested lists of numbers.
        origin: where it came from (file and key), for the message.
        images: they are pixels of type uint8, to be divided by 255.

    Raises:
        ValueError: if it does not hold numbers, a row holds a single bare number, or images are not uint8.
    """
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
    kind = np.int64 if values.dtype.kind in "iu" and values.dtype != np.uint8 else np.float32
    return torch.from_numpy(np.require(values, dtype=kind, requirements=["C", "W"]))


def as_targets(array: object, origin: str) -> Tensor:
    """Targets as int64, [n] or [n, T].

    Raises:
        ValueError: if they are not integers.
    """
    values = _numeric(array, origin, "integer classes")
    if values.dtype.kind not in "iub":
        raise ValueError(
            f"{origin}: labels must be integers from 0, got {values.dtype}; save them with .astype('int64') and "
            f"without missing values"
        )
    if values.ndim not in (1, 2):
        raise ValueError(f"{origin}: labels must be [n], or [n, T] for sequences, got shape {list(values.shape)}")
    return torch.from_numpy(np.require(values, dtype=np.int64, requirements=["C", "W"]))


def _numeric(array: object, origin: str, wanted: str) -> np.ndarray:
    try:
        values = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
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
