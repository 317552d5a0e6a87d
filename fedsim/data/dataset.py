"""What a source gives: training rows, held-out rows and, where the data has them, the client of each training row.

Letters: n samples, T length of a sequence, G natural clients (groups).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fedsim.data.checks import check_finite, check_rows
from fedsim.trees import IGNORED, Tree, one, tensors


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Samples to train on and samples held out for the server.

    Args:
        inputs: [n, ...] float32, or int64 tokens; or a dictionary of such tensors (masks may be bool), which a module
            gets as keyword arguments.
        targets: [n] int64 classes, [n, T] for sequences (-100 where nothing is predicted), or [n, ...] float32
            numbers; or a dictionary.
        test_inputs: [n_test, ...]; may have no rows.
        test_targets: [n_test, ...].
        num_classes: how many values a class may take; of numbers, how many make up a target.
        class_names: one per class, where the data has names for them.
        gaps: classes below the largest that no row has, where `num_classes` was only guessed from that.
        notes: what a reader of the results should know about the data, one sentence each.
    """

    inputs: Tree
    targets: Tree
    test_inputs: Tree
    test_targets: Tree
    num_classes: int
    class_names: tuple[str, ...] | None = None
    gaps: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """n."""
        return len(one(self.targets))

    @property
    def has_classes(self) -> bool:
        """Whether all targets are classes, 0 to num_classes - 1."""
        y = self.targets
        return isinstance(y, Tensor) and y.dtype == torch.int64 and (not y.numel() or int(y.min()) >= 0)

    def check(self, origin: str) -> Self:
        """Refuse what cannot be trained on, naming `origin`; returns the data itself.

        Raises:
            ValueError: for inputs that are no number or infinite, classes out of range, shapes or types that do not
                fit, or no samples.
        """
        if not len(one(self.inputs)):
            raise ValueError(f"{origin}: the data set is empty, it has no training rows")
        trained, held = (self.inputs, self.targets), (self.test_inputs, self.test_targets)
        for part, (x, y) in (("training", trained), ("test", held)):
            rows, labels = check_rows(x, f"{origin}: {part} inputs"), check_rows(y, f"{origin}: {part} targets")
            if rows != labels:
                raise ValueError(f"{origin}: {rows} {part} inputs but {labels} labels; one label per row is needed")
            if row(x, y) != row(*trained):
                raise ValueError(f"{origin}: test rows are {row(x, y)}, training rows {row(*trained)}; they must agree")
            for name, t in tensors(x).items():
                if t.dtype not in (torch.float32, torch.int64, *([torch.bool] if name else [])):
                    raise ValueError(f"{origin}: {part} inputs must be float32, or int64 tokens, got {t.dtype}")
                check_finite(t, f"{origin}: {part} inputs")
            for t in tensors(y).values():
                if t.dtype not in (torch.float32, torch.int64):
                    raise ValueError(f"{origin}: {part} targets must be int64 classes or float32, got {t.dtype}")
                check_finite(t, f"{origin}: {part} targets")
            if isinstance(y, Tensor) and y.dtype == torch.int64:
                _check_classes(y, self.num_classes, f"{origin}: the {part} label")
        return self


def _check_classes(y: Tensor, num_classes: int, what: str) -> None:
    if not y.numel() or (int(y.min()) >= 0 and int(y.max()) < num_classes):
        return
    wrong = ((y < 0) & (y != IGNORED)) | (y >= num_classes)
    if y.ndim == 1:  # a sample without a class would not be one
        wrong = wrong | (y == IGNORED)
    if wrong.any():
        bad = int(wrong.view(len(y), -1).any(1).nonzero()[0])
        raise ValueError(
            f"{what} of row {bad} is {y[bad].tolist()}, but labels must be 0 to {num_classes - 1}; renumber them or "
            "set num_classes"
        )


def row(x: Tree, y: Tree) -> str:
    """Type and shape of one row of inputs and of targets, for messages."""

    def shown(t: Tensor) -> str:
        return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}"

    return " -> ".join(", ".join(f"{k} {shown(t)}".strip() for k, t in tensors(tree).items()) for tree in (x, y))


@dataclass(frozen=True, kw_only=True)
class Dataset(LabelledRows):
    """Samples before they are given to clients.

    Args:
        groups: [n] int64 in 0..G-1, the natural client of each training row.
        group_names: G names.
        test_groups: [n_test] int64, the natural client that holds out each held-out row; None if the server does.
    """

    groups: Tensor | None = None
    group_names: tuple[str, ...] | None = None
    test_groups: Tensor | None = None

    def check(self, origin: str) -> Self:
        """See `LabelledRows.check`."""
        super().check(origin)
        for groups, rows in ((self.groups, self.targets), (self.test_groups, self.test_targets)):
            if groups is None:
                continue
            if self.group_names is None or self.groups is None:
                raise ValueError(f"{origin}: groups need group_names, one name per natural client")
            n = len(one(rows))
            if groups.shape != (n,) or groups.dtype != torch.int64:
                raise ValueError(f"{origin}: groups must be int64 with one entry for each of {n} rows")
            if n and (groups.min() < 0 or groups.max() >= len(self.group_names)):
                raise ValueError(f"{origin}: groups must be 0 to {len(self.group_names) - 1}, one per name")
        return self
