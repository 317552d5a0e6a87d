"""Data sets from arrays.

Letters: n samples, T length of a sequence, G natural clients (groups).
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor

from fedsim import pages
from fedsim.data.checks import as_inputs, as_keys, as_targets, check_fraction
from fedsim.data.dataset import Dataset
from fedsim.streams import server_rng
from fedsim.trees import IGNORED, Tree, one, pick, tensors

MANY = 100_000  # classes that even a few rows may have, without saying so
MAX_LISTED = 1 << 16  # classes that are looked through for gaps


def from_arrays(
    x: object,
    y: object = None,
    x_test: object = None,
    y_test: object = None,
    *,
    clients: object = None,
    test_clients: object = None,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
    images: bool = False,
    origin: str = "data",
) -> Dataset:
    """A data set from arrays, converted as `checks.as_inputs` and `checks.as_targets` say.

    Args:
        x: [n, ...], or a dictionary of arrays.
        y: [n, ...]: integers are classes or tokens, other numbers are taken as they are. Without targets, x holds
            tokens (in a dictionary, `input_ids` does) and the targets are the next ones, `next_tokens`.
        x_test: held-out rows. Without them a share of the training rows is held out, class by class; which rows does
            not depend on the run's seed.
        y_test: their targets.
        clients: [n] keys of the natural clients.
        test_clients: [n_test] keys of the clients that hold out these rows, so that each one's own model is evaluated
            on them.
        num_classes: by default one more than the largest label or token.
        test_fraction: the share held out when there is no x_test; 0 holds out nothing.
        images: inputs are pixels of type uint8, to be divided by 255; the notes then say so.
        origin: where the arrays come from, for messages.

    Raises:
        ValueError: if anything does not fit.
    """
    inputs, targets = _pair(x, y, "", images, origin)
    if (x_test is None) != (y_test is None) and (x_test is None or y is not None):
        raise ValueError(f"{origin}: test inputs and test labels must be given together")
    groups, test_groups, names = _groups(clients, test_clients, one(inputs), x_test, origin)
    if x_test is not None:
        test_inputs, test_targets = _pair(x_test, y_test, "test ", images, origin)
    else:
        train, test = _rows(inputs, targets, test_fraction, origin)
        test_inputs, test_targets = pick(inputs, test), pick(targets, test)
        if len(test):
            inputs, targets = pick(inputs, train), pick(targets, train)
            groups = None if groups is None else groups[train]
    said = (inputs, test_inputs) if y is None else (targets, test_targets)
    classes, gaps = _classes(*said, origin) if num_classes is None else (num_classes, ())
    return Dataset(
        inputs=inputs,
        targets=targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
        num_classes=classes,
        gaps=gaps,
        groups=groups,
        group_names=names,
        test_groups=test_groups,
        notes=_scaling(x, images),
    ).check(origin)


def _pair(x: object, y: object, part: str, images: bool, origin: str) -> tuple[Tree, Tree]:
    inputs = as_inputs(x, f"{origin}: {part}inputs", images)
    if y is None:
        return inputs, next_tokens(inputs, f"{origin}: {part}inputs")
    targets = as_targets(y, f"{origin}: {part}labels")
    if len(one(inputs)) != len(one(targets)):
        raise ValueError(
            f"{origin}: {len(one(inputs))} {part}inputs but {len(one(targets))} labels; one label per row is needed"
        )
    return inputs, targets


def _rows(inputs: Tree, targets: Tree, fraction: float, origin: str) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows held out), which are copied; refused where memory has no room for that."""
    train, test = hold_out(targets, fraction, origin)
    size = sum(t.nbytes for t in tensors(inputs).values())
    if len(test) and not pages.room_for(size):
        raise ValueError(
            f"{origin}: there is no room to copy {size / 2**30:,.1f} GiB of inputs, as holding out a share of them "
            "does; give x_test and y_test, or test_fraction: 0"
        )
    return train, test


def next_tokens(inputs: Tree, origin: str = "inputs") -> Tensor:
    """[n, T] targets of a language model: at every position the next token, -100 at the last one and before padding.

    Args:
        inputs: [n, T] tokens, or a dictionary with `input_ids` and perhaps `attention_mask` (0 for padding).
        origin: for the message.

    >>> next_tokens({"input_ids": torch.tensor([[5, 6, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    tensor([[   6,    7, -100, -100]])
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids")
    if ids is None or ids.dtype != torch.int64 or ids.ndim != 2:
        raise ValueError(f"{origin}: without targets they must be tokens, [n, T] integers; give targets as well")
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    if isinstance(inputs, dict) and "attention_mask" in inputs:
        targets[:, :-1][inputs["attention_mask"][:, 1:] == 0] = IGNORED
    return targets


def _groups(
    clients: object, test_clients: object, inputs: Tensor, x_test: object, origin: str
) -> tuple[Tensor | None, Tensor | None, tuple[str, ...] | None]:
    """(natural client of each training row, of each held-out row, their names)."""
    if test_clients is not None and (clients is None or x_test is None):
        raise ValueError(f"{origin}: test_clients need clients, the keys of the training rows, and test inputs")
    if clients is None:
        return None, None, None
    if test_clients is None:
        groups, names = as_keys(clients, len(inputs), f"{origin}: clients")
        return groups, None, names
    held = np.asarray(test_clients)
    both = np.concatenate([np.asarray(clients), held])
    codes, names = as_keys(both, len(inputs) + len(held), f"{origin}: clients and test_clients")
    return codes[: len(inputs)], codes[len(inputs) :], names


def _classes(targets: Tree, test_targets: Tree, origin: str) -> tuple[int, tuple[int, ...]]:
    """(num_classes as classes or tokens say, classes that no row has); of numbers, how many make up a target.

    Raises:
        ValueError: if there would be so many classes that the labels can't be meant.
    """
    if isinstance(targets, dict) and isinstance(test_targets, dict):
        targets, test_targets = (part.get("input_ids", one(part)) for part in (targets, test_targets))
    assert isinstance(targets, Tensor) and isinstance(test_targets, Tensor)
    if targets.is_floating_point():
        return prod(targets.shape[1:]), ()
    number = 1 + max((int(t.max()) for t in (targets, test_targets) if t.numel()), default=0)
    if number > max(MANY, 100 * targets.numel()):
        raise ValueError(
            f"{origin}: labels go up to {number - 1:,} in {len(targets):,} rows; number them from 0 without gaps, or "
            "set num_classes"
        )
    if targets.ndim > 1:
        return number, ()
    seen = set(torch.cat([targets, test_targets]).unique().tolist())
    return number, tuple(k for k in range(min(number, MAX_LISTED)) if k not in seen)


def _scaling(x: object, images: bool) -> tuple[str, ...]:
    """What was done to bytes, which may be pixels or plain numbers."""
    if images:
        return ("Pixels were divided by 255.",)
    is_bytes = isinstance(x, np.ndarray | Tensor) and str(x.dtype).endswith("uint8")
    if is_bytes and len(x) and int(x.max()) > 1:  # type: ignore[arg-type, attr-defined]
        return ("Inputs of type uint8 were taken as they are; `images: true` divides pixels by 255.",)
    return ()


def hold_out(targets: Tree, fraction: float, origin: str = "data") -> tuple[Tensor, Tensor]:
    """Training rows and held-out rows, the same share of every class; what is no class counts as one.

    Args:
        targets: [n] classes, or anything else [n, ...].
        fraction: in [0, 1); every class gives up round(fraction * its size) rows.
        origin: for the message.

    Returns:
        (rows to train on, rows held out), each sorted.

    >>> train, test = hold_out(torch.tensor([0, 0, 0, 0, 1, 1]), 0.5)
    >>> len(train), sorted(torch.tensor([0, 0, 0, 0, 1, 1])[test].tolist())
    (3, [0, 0, 1])
    """
    check_fraction(f"{origin}: test_fraction", fraction)
    classes = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
    labels = one(targets).numpy() if classes else np.zeros(len(one(targets)), dtype=np.int64)
    shuffled = server_rng(0, "data.hold_out").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[by_class], prepend=-1))
    held = np.zeros(len(labels), dtype=bool)
    for start, end in pairwise([*starts, len(labels)]):
        held[by_class[start : start + round(fraction * (end - start))]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
