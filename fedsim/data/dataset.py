"""What a source gives: training rows, held-out rows and, where the data has them, the client of each training row.

Letters: n samples, T length of a sequence, G natural clients (groups).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fedsim.data.checks import as_inputs, as_keys, as_targets, check_fraction
from fedsim.streams import server_rng

_ROWS = 1 << 16  # rows looked at together when searching for NaN


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Samples to train on and samples held out for the server.

    Args:
        inputs: [n, ...] float32, or int64 tokens.
        targets: [n] int64 classes, or [n, T] for sequences.
        test_inputs: [n_test, ...]; may have no rows.
        test_targets: [n_test] or [n_test, T].
        num_classes: how many values a target may take.
        class_names: one per class, where the data has names for them.
        notes: what a reader of the results should know about the data, one sentence each.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    num_classes: int
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def check(self, origin: str) -> Self:
        """Refuse what cannot be trained on, naming `origin`; returns the data itself.

        Raises:
            ValueError: for inputs that are no number or infinite, targets out of range, shapes or types that do not
                fit, or no samples.
        """
        if not len(self.inputs):
            raise ValueError(f"{origin}: the data set is empty, it has no training rows")
        trained, held = (self.inputs, self.targets), (self.test_inputs, self.test_targets)
        for part, (x, y) in (("training", trained), ("test", held)):
            if len(x) != len(y):
                raise ValueError(f"{origin}: {len(x)} {part} inputs but {len(y)} labels; one label per row is needed")
            if x.dtype not in (torch.float32, torch.int64):
                raise ValueError(f"{origin}: {part} inputs must be float32, or int64 tokens, got {x.dtype}")
            if y.dtype != torch.int64:
                raise ValueError(f"{origin}: {part} targets must be int64 classes, got {y.dtype}")
            if row(x, y) != row(*trained):
                raise ValueError(f"{origin}: test rows are {row(x, y)}, training rows {row(*trained)}; they must agree")
            _check_finite(x, f"{origin}: {part} inputs")
            if len(y) and (y.min() < 0 or y.max() >= self.num_classes):
                wrong = (y < 0) | (y >= self.num_classes)
                bad = int(wrong.view(len(y), -1).any(1).nonzero()[0])
                raise ValueError(
                    f"{origin}: the {part} label of row {bad} is {y[bad].tolist()}, but labels must be 0 to "
                    f"{self.num_classes - 1}; renumber them or set num_classes"
                )
        return self


def _check_finite(x: Tensor, what: str) -> None:
    if not x.is_floating_point() or not x.numel():
        return
    low, high = x.aminmax()  # one cheap pass; NaN wins over every number
    if torch.isfinite(low) and torch.isfinite(high):
        return
    for first in range(0, len(x), _ROWS):
        finite = torch.isfinite(x[first : first + _ROWS]).flatten(1).all(1)
        if not finite.all():
            bad = first + int((~finite).nonzero()[0])
            raise ValueError(f"{what}: row {bad} holds NaN or infinity; drop the row or fill the gap before training")


def row(x: Tensor, y: Tensor) -> str:
    """Type and shape of one row of inputs and of targets, for messages."""
    return " -> ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}" for t in (x, y))


@dataclass(frozen=True, kw_only=True)
class Dataset(LabelledRows):
    """Samples before they are given to clients.

    Args:
        groups: [n] int64 in 0..G-1, the natural client of each training row.
        group_names: G names.
    """

    groups: Tensor | None = None
    group_names: tuple[str, ...] | None = None

    def check(self, origin: str) -> Self:
        """See `LabelledRows.check`."""
        super().check(origin)
        if self.groups is not None:
            if self.group_names is None:
                raise ValueError(f"{origin}: groups need group_names, one name per natural client")
            if self.groups.shape != self.targets.shape[:1] or self.groups.dtype != torch.int64:
                raise ValueError(f"{origin}: groups must be int64 with one entry for each of {len(self.inputs)} rows")
            if self.groups.min() < 0 or self.groups.max() >= len(self.group_names):
                raise ValueError(f"{origin}: groups must be 0 to {len(self.group_names) - 1}, one per name")
        return self


def from_arrays(
    x: object,
    y: object,
    x_test: object = None,
    y_test: object = None,
    *,
    clients: object = None,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
    images: bool = False,
    origin: str = "data",
) -> Dataset:
    """A data set from arrays, converted as `checks.as_inputs` and `checks.as_targets` say.

    Args:
        x: [n, ...].
        y: [n] or [n, T] integers.
        x_test: held-out rows. Without them a share of the training rows is held out, class by class; which rows does
            not depend on the run's seed.
        y_test: their labels.
        clients: [n] keys of the natural clients.
        num_classes: by default one more than the largest label.
        test_fraction: the share held out when there is no x_test; 0 holds out nothing.
        images: inputs are pixels of type uint8, to be divided by 255; the notes then say so.
        origin: where the arrays come from, for messages.

    Raises:
        ValueError: if anything does not fit.
    """
    inputs, targets = as_inputs(x, f"{origin}: inputs", images), as_targets(y, f"{origin}: labels")
    if len(inputs) != len(targets):
        raise ValueError(f"{origin}: {len(inputs)} inputs but {len(targets)} labels; one label per row is needed")
    groups, names = (None, None) if clients is None else as_keys(clients, len(inputs), f"{origin}: clients")
    if (x_test is None) != (y_test is None):
        raise ValueError(f"{origin}: test inputs and test labels must be given together")
    if x_test is not None:
        test_inputs = as_inputs(x_test, f"{origin}: test inputs", images)
        test_targets = as_targets(y_test, f"{origin}: test labels")
    else:
        train, test = hold_out(targets, test_fraction, origin)
        inputs, targets, test_inputs, test_targets = inputs[train], targets[train], inputs[test], targets[test]
        groups = None if groups is None else groups[train]
    if num_classes is None:
        num_classes = 1 + max((int(t.max()) for t in (targets, test_targets) if t.numel()), default=0)
    return Dataset(
        inputs=inputs,
        targets=targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
        num_classes=num_classes,
        groups=groups,
        group_names=names,
        notes=_scaling(x, images),
    ).check(origin)


def _scaling(x: object, images: bool) -> tuple[str, ...]:
    """What was done to bytes, which may be pixels or plain numbers."""
    if images:
        return ("Pixels were divided by 255.",)
    is_bytes = isinstance(x, np.ndarray | Tensor) and str(x.dtype).endswith("uint8")
    if is_bytes and len(x) and int(x.max()) > 1:  # type: ignore[arg-type, attr-defined]
        return ("Inputs of type uint8 were taken as they are; `images: true` divides pixels by 255.",)
    return ()


def hold_out(targets: Tensor, fraction: float, origin: str = "data") -> tuple[Tensor, Tensor]:
    """Training rows and held-out rows, the same share of every class; sequences count as one class.

    Args:
        targets: [n] or [n, T].
        fraction: in [0, 1); every class gives up round(fraction * its size) rows.
        origin: for the message.

    Returns:
        (rows to train on, rows held out), each sorted.

    >>> train, test = hold_out(torch.tensor([0, 0, 0, 0, 1, 1]), 0.5)
    >>> len(train), sorted(torch.tensor([0, 0, 0, 0, 1, 1])[test].tolist())
    (3, [0, 0, 1])
    """
    check_fraction(f"{origin}: test_fraction", fraction)
    labels = targets.numpy() if targets.ndim == 1 else np.zeros(len(targets), dtype=np.int64)
    shuffled = server_rng(0, "data.hold_out").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[by_class], prepend=-1))
    held = np.zeros(len(labels), dtype=bool)
    for start, end in pairwise([*starts, len(labels)]):
        held[by_class[start : start + round(fraction * (end - start))]] = True
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
