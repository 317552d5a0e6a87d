"""From a data set and a partition to the data of a federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import torch

from fedsim.config import decode_entry
from fedsim.data.dataset import Dataset, LabelledRows
from fedsim.data.federated import FederatedData
from fedsim.data.partition import PARTITIONS, Natural, Partition
from fedsim.data.sources import Spec, load
from fedsim.streams import server_rng


def build(
    dataset: Spec | Dataset | FederatedData,
    partition: Spec | Partition = "iid",
    num_clients: int | None = None,
    seed: int = 0,
    *,
    root: str | None = None,
) -> FederatedData:
    """The data of a federation, checked.

    Args:
        dataset: a data set, or what `sources.load` takes. One that is federated already passes through; its notes
            then say that the partition was not used.
        partition: a recipe, or its name and fields as a configuration writes them.
        num_clients: N. The natural partition takes it from the data; so does a data set that is federated already.
        seed: the run's seed; the split depends on it and on the partition, not on the rest of the run.
        root: the configuration's `data.root`.

    Raises:
        ValueError: if the data cannot be read or does not pass `FederatedData.check`, the number of clients is missing
            or contradicts the data, or the partition leaves every client without samples.

    >>> data = build("digits", {"name": "dirichlet", "alpha": 0.5}, 10)
    >>> data.num_clients, int(data.num_examples.sum())
    (10, 1438)
    """
    data = load(dataset, root=root, seed=seed)
    if isinstance(data, FederatedData):
        if num_clients not in (None, data.num_clients):
            raise ValueError(
                f"clients.count={num_clients}, but the data comes with {data.num_clients} clients; leave it out"
            )
        note = "The data came with its own clients; the partition was not used."
        return replace(data, notes=tuple(dict.fromkeys((*data.notes, note)))).check()
    return split(data, partition, num_clients, seed)


def split(
    data: Dataset, partition: Spec | Partition = "iid", num_clients: int | None = None, seed: int = 0
) -> FederatedData:
    """Give the training rows of a data set to clients; see `build`."""
    recipe: Partition = (
        decode_entry(PARTITIONS, partition, "partition")() if isinstance(partition, str | Mapping) else partition
    )
    natural = isinstance(recipe, Natural) and data.group_names is not None
    if natural:
        assert data.group_names is not None
        if num_clients not in (None, len(data.group_names)):
            raise ValueError(
                f"clients.count={num_clients}, but the data has {len(data.group_names)} natural clients; leave it "
                f"out or choose another partition"
            )
        num_clients = len(data.group_names)
    if not isinstance(recipe, Natural) and (num_clients is None or num_clients < 1):
        raise ValueError(f"clients.count must be 1 or more, got {num_clients}")
    try:
        order, offsets = recipe(data, num_clients or 0, server_rng(seed, "data.partition"))
    except MemoryError as e:
        raise ValueError(f"clients.count={num_clients} is too large for this machine's memory ({e}); lower it") from e
    same = {f.name: getattr(data, f.name) for f in fields(LabelledRows)}
    return FederatedData(
        **same,
        offsets=torch.from_numpy(np.asarray(offsets, dtype=np.int64)),
        order=torch.from_numpy(np.asarray(order, dtype=np.int64)),
        client_names=data.group_names if natural else None,
        test_owners=data.test_groups if natural else None,
    ).check("data")
