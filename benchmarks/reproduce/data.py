"""Data sets cut to what two cores get through."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, one_hot

from fedsim.data.dataset import Dataset
from fedsim.data.images import fashion_mnist
from fedsim.data.text import shakespeare


def some_clothes(train: int, test: int, *, pool: int = 1, root: str | None = None) -> Dataset:
    """The first images of Fashion-MNIST, whose order is random: so many to train on and to test on.

    Args:
        train, test: how many.
        pool: width in pixels of the squares that become one pixel, their mean.
        root: the folder of the configuration's `data.root`.
    """
    whole = fashion_mnist(root=root)
    assert isinstance(whole.inputs, Tensor) and isinstance(whole.test_inputs, Tensor)
    return replace(
        whole,
        inputs=avg_pool2d(whole.inputs[:train], pool),
        targets=whole.targets[:train],
        test_inputs=avg_pool2d(whole.test_inputs[:test], pool),
        test_targets=whole.test_targets[:test],
    )


def loudest_speakers(count: int, *, each: int, test: int, context: int = 8, root: str | None = None) -> Dataset:
    """Shakespeare's plays by the `count` speakers who say most, one client each: the next character from the last few.

    Args:
        count: of speakers.
        each: samples of a speaker, evenly spread over all that it says; at most what it says.
        test: samples held out, evenly spread over all that all speakers hold out.
        context: characters that are known.

    Returns:
        inputs [n, context * V], a one-hot vector of V characters at each place.
    """
    whole = shakespeare(root=root, sequence_length=context)
    assert whole.groups is not None and whole.test_inputs is not None and whole.test_targets is not None
    vocabulary = whole.num_classes
    loud = torch.bincount(whole.groups).argsort(descending=True, stable=True)[:count]
    rows = [evenly(torch.nonzero(whole.groups == speaker).flatten(), each) for speaker in loud]
    held_out = evenly(torch.arange(len(whole.test_inputs)), test)
    kept = torch.cat(rows)
    return replace(
        whole,
        inputs=one_hot(whole.inputs[kept], vocabulary).flatten(1).float(),
        targets=whole.targets[kept, -1],
        test_inputs=one_hot(whole.test_inputs[held_out], vocabulary).flatten(1).float(),
        test_targets=whole.test_targets[held_out, -1],
        groups=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(part) for part in rows])),
        group_names=tuple(whole.group_names[i] for i in loud.tolist()),
    )


def evenly(rows: Tensor, count: int) -> Tensor:
    """So many of the rows, evenly spread; all of them where there are fewer.

    >>> evenly(torch.arange(9), 3)
    tensor([0, 4, 8])
    """
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
