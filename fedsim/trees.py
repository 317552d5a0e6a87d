"""A tensor, or a dictionary of tensors by name: samples, targets and batches of them.

All tensors of a dictionary have the samples in front, as the one tensor has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Tree = Tensor | dict[str, Tensor]


IGNORED = -100
"""The target of a position that does not count, as torch and Hugging Face write it."""


def each(change: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same with every tensor changed.

    >>> import torch
    >>> each(len, torch.zeros(3, 2)), each(len, {"ids": torch.zeros(3, 2), "mask": torch.ones(3)})
    (3, {'ids': 3, 'mask': 3})
    """
    return change(tree) if isinstance(tree, Tensor) else {name: change(t) for name, t in tree.items()}


def tensors(tree: Tree) -> dict[str, Tensor]:
    """{name: tensor}; the one tensor has an empty name."""
    return {"": tree} if isinstance(tree, Tensor) else tree


def one(tree: Tree) -> Tensor:
    """Some tensor of it, which has the samples in front as the others do."""
    return tree if isinstance(tree, Tensor) else next(iter(tree.values()))


def pick(tree: Tree, index: Any) -> Tree:
    """tree[index] of every tensor."""
    return tree[index] if isinstance(tree, Tensor) else {name: t[index] for name, t in tree.items()}
