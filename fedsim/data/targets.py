"""What targets are: classes, tokens, numbers or labels. A preset of the supervised task says which it takes.

Letters: n samples, T length of a sequence, L labels, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import prod
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData

Kind = Literal["any", "classes", "tokens", "numbers", "labels"]
Data = TypeVar("Data", Dataset, FederatedData)


def as_kind(data: Data, kind: Kind) -> Data:
    """The data with targets of a kind, converted where nothing is lost.

    Args:
        data: training and held-out rows.
        kind: `classes`: int64 [n] or [n, T], 0 to K - 1. `tokens`: the same with -100 where nothing is predicted.
            `numbers`: floating point of any shape. `labels`: 1 or 0 for each of L, [n, L]. `any`: as they are.

    Raises:
        ValueError: for targets of another kind; it names the task that takes them.
    """
    if kind == "any":
        return data
    targets, held = data.targets, data.test_targets
    if not isinstance(targets, Tensor) or not isinstance(held, Tensor):
        raise ValueError(f"its targets are a dictionary; take task.name: supervised and a loss of your own, not {kind}")
    if kind in ("classes", "tokens"):
        if targets.dtype != torch.int64:
            raise ValueError(
                f"its targets are numbers, {_shown(targets)}; take task.name: regression, or save labels as integers "
                "from 0 without missing values"
            )
        if kind == "classes" and any(bool((part < 0).any()) for part in (targets, held)):
            raise ValueError("some of its labels are -100, which do not count; take task.name: language_model")
        if data.gaps:
            shown = ", ".join(map(str, data.gaps[:5])) + (", ..." if len(data.gaps) > 5 else "")
            warnings.warn(
                f"task.dataset: labels go up to {data.num_classes - 1}, but no row has class {shown}, so the model has "
                "outputs that nothing trains; number the labels from 0 without gaps, or set num_classes",
                stacklevel=2,
            )
        return data
    if kind == "labels":
        for part in (targets, held):
            if part.ndim != 2 or not bool(((part == 0) | (part == 1)).all()):
                raise ValueError(
                    f"its targets are {_shown(targets)}; multilabel takes 1 or 0 for each label, [n, L]; take "
                    "task.name: classification for one class a sample"
                )
    elif targets.dtype == torch.int64 and data.class_names is not None:
        raise ValueError("its targets are classes with names; take task.name: classification")
    return replace(
        data,
        targets=targets.float(),
        test_targets=held.float(),
        num_classes=prod(targets.shape[1:]),
        class_names=data.class_names if kind == "labels" else None,
    )


def _shown(targets: Tensor) -> str:
    return f"{str(targets.dtype).removeprefix('torch.')}{list(targets.shape)}"
