"""The table of data sets, and loading one by its name in a configuration.

An entry is a function of keyword parameters that returns a `Dataset`; the first line of its docstring is its line in
`fedsim list datasets`. Parameters called `root` and `seed` are filled from the configuration's `data.root` and `seed`
where `task.dataset` does not give them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from fedsim.config import Call, Kinds, decode_entry
from fedsim.data.arrays import from_arrays
from fedsim.data.bundled import diabetes
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.files import csv, npz, parquet
from fedsim.data.hub import huggingface, torchvision
from fedsim.data.images import digits, fashion_mnist
from fedsim.data.synthetic import blobs, marks, synthetic
from fedsim.data.tables import from_samples
from fedsim.data.text import shakespeare

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "shakespeare": shakespeare,
    "diabetes": diabetes,
    "npz": npz,
    "parquet": parquet,
    "csv": csv,
    "huggingface": huggingface,
    "torchvision": torchvision,
    "blobs": blobs,
    "marks": marks,
    "synthetic": synthetic,
}

Spec = str | Mapping[str, Any]
"""A table entry as a configuration writes it: a name, or a mapping of `name` and its fields."""


def load(spec: Spec | Dataset | FederatedData, *, root: str | None = None, seed: int = 0) -> Dataset | FederatedData:
    """The data set that a configuration names.

    Args:
        spec: an entry of DATASETS or of your own, or a data set, which passes through.
        root: the configuration's `data.root`, the folder where data sets look first.
        seed: the run's seed, for data sets that are drawn.

    Raises:
        ValueError: if the name or a parameter is unknown or of the wrong type, or the data set cannot be read. An
            exception of another kind from the user's own function is not caught.

    >>> data = load({"name": "blobs", "num_examples": 30, "shape": [4]})
    >>> data.inputs.shape, data.num_classes
    (torch.Size([30, 4]), 10)
    """
    if isinstance(spec, Dataset | FederatedData):
        return spec
    return entry(spec, "task.dataset")(root=root, seed=seed)


def entry(value: Any, key: str, kinds: Kinds | None = None) -> Call:
    """The data set that an entry describes, to be read once the configuration's `root` and `seed` are given."""
    call = decode_entry(DATASETS, value, key, kinds, fills=("root", "seed"), check=as_dataset)
    return _Reading(**{f.name: getattr(call, f.name) for f in fields(Call)})


@contextmanager
def kept() -> Iterator[None]:
    """Inside, the data set read last stays in memory: a process that makes many runs on one data set reads it once."""
    global _last
    before, _last = _last, []
    try:
        yield
    finally:
        _last = before


_last: list[Any] | None = None
"""What made the data set that is kept, with which arguments, and the data set; the first is kept as well, or another
function might get its place in memory and pass for it."""


@dataclass(frozen=True, eq=False)
class _Reading(Call):
    """The call that reads a data set, or takes the one that it has read before where that is kept."""

    def __call__(self, **given: Any) -> Any:
        if _last is None:
            return super().__call__(**given)
        said = repr((self.resolved, {k: v for k, v in given.items() if self.takes(k)}))
        if not (_last and _last[0] is self.target and _last[1] == said):
            _last.clear()  # before the next is read
            _last[:] = self.target, said, super().__call__(**given)
        return _last[2]


def as_dataset(made: object, origin: str) -> Dataset | FederatedData:
    """What a source returned as a checked data set.

    Args:
        made: a Dataset, a FederatedData, arrays or tensors (x, y), (x, y, clients) or (x, y, x_test, y_test), which
            `from_arrays` takes, or a torch Dataset; without test rows a fifth of every class is held out.

    Raises:
        ValueError: if it is something else, or does not pass the checks.
    """
    if isinstance(made, Dataset | FederatedData):
        return made.check(origin)
    if isinstance(made, tuple) and len(made) in (2, 4):
        return from_arrays(*made, origin=origin)
    if isinstance(made, tuple) and len(made) == 3:
        return from_arrays(made[0], made[1], clients=made[2], origin=origin)
    if isinstance(made, torch.utils.data.Dataset):
        return from_samples(made, origin=origin)
    raise ValueError(
        f"{origin} returned {type(made).__name__}; return a Dataset, a FederatedData, (x, y), (x, y, clients), "
        "(x, y, x_test, y_test), a torch Dataset, or what fedsim.data.from_table makes of a table or dictionary"
    )
