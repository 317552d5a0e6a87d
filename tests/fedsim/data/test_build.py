"""From a configuration's data set and partition to checked data of a federation."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from fedsim.data import PARTITIONS, Dataset, build, from_arrays, split
from fedsim.data.partition import Dirichlet

X, Y = np.arange(24.0).reshape(12, 2), np.arange(12) % 3


def small(clients: object = None) -> Dataset:
    return from_arrays(X, Y, X[:1], Y[:1], clients=clients)


def test_the_quickstarts_federation():
    data = build("digits", {"name": "dirichlet", "alpha": 0.1}, 100)
    assert data.num_clients == 100 and int(data.num_examples.sum()) == 1438
    assert data.class_counts().sum(0).tolist() == data.targets.bincount().tolist()
    assert data.class_names == tuple("0123456789")


def test_the_seed_decides_the_split_and_nothing_else_does():
    def order(seed):
        return build(small(), "iid", 3, seed).order

    assert torch.equal(order(1), order(1)) and not torch.equal(order(1), order(2))


@pytest.mark.parametrize("name", PARTITIONS)
def test_every_partition_builds_from_its_name(name):
    fields = {"dirichlet": {"alpha": 1}, "dirichlet_client": {"alpha": 1}, "quantity_skew": {"alpha": 1},
              "classes": {"classes_per_client": 2}}  # fmt: skip
    data = build(small(clients=np.arange(12) % 4), {"name": name, **fields.get(name, {})}, 4)
    assert data.num_clients == 4 and int(data.num_examples.sum()) == 12


def test_natural_clients_come_from_the_data_with_their_names():
    data = build(small(clients=["b", "a", "b"] * 4), "natural")
    assert data.client_names == ("a", "b") and data.num_examples.tolist() == [4, 8]
    rows = data.rows(torch.tensor([0]), torch.arange(4)[None])[0]
    assert rows.tolist() == [1, 4, 7, 10]
    assert build(small(clients=["b", "a", "b"] * 4), "natural", 2).num_clients == 2
    assert build(small(clients=["b", "a", "b"] * 4), "iid", 5).client_names is None


def test_federated_data_passes_through_and_says_so():
    data = split(small(), "iid", 3)
    again = build(data, "iid")
    assert again.order is data.order and "the partition was not used" in again.notes[-1]
    assert build(again, "iid", 3).notes == again.notes
    with pytest.raises(ValueError, match="clients.count=4, but the data comes with 3 clients"):
        build(data, "iid", 4)


def test_clients_without_samples_are_ordinary():
    data = build(small(), "iid", 40)
    assert data.num_clients == 40 and int((data.num_examples == 0).sum()) == 28


@dataclass(frozen=True, kw_only=True)
class Nobody:
    """A recipe that gives everybody nothing."""

    def __call__(self, data, num_clients, rng):
        return np.zeros(0, dtype=np.int64), np.zeros(num_clients + 1, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Beyond:
    """A recipe that names a row which does not exist."""

    def __call__(self, data, num_clients, rng):
        return np.array([len(data.targets)]), np.array([0] + [1] * num_clients)


def test_the_users_own_recipe_is_taken_and_checked():
    data = build(small(), f"{Dirichlet.__module__}:Iid", 3)
    assert data.num_examples.tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="the partition is empty, none of the 3 clients has a sample"):
        build(small(), Nobody(), 3)
    with pytest.raises(ValueError, match="names rows 12 to 12, but the rows are 0 to 11"):
        build(small(), Beyond(), 3)


@pytest.mark.parametrize(
    ("clients", "partition", "count", "message"),
    [
        (None, "natural", 3, "the data names no clients"),
        ([0, 1] * 6, "natural", 3, "clients.count=3, but the data has 2 natural clients"),
        (None, "iid", 0, "clients.count must be 1 or more, got 0"),
        (None, "iid", None, "clients.count must be 1 or more, got None"),
        (None, "dirichle", 3, "unknown name 'dirichle'; did you mean 'dirichlet'"),
        (None, {"name": "dirichlet"}, 3, "alpha: missing"),
        (None, {"name": "dirichlet", "alpha": -1}, 3, "alpha must be 0 or more and finite, got -1"),
        (None, {"name": "dirichlet", "alpha": 1, "beta": 1}, 3, "beta: unknown key"),
    ],
)
def test_contradictions_are_refused(clients, partition, count, message):
    with pytest.raises(ValueError, match=message):
        build(small(clients), partition, count)


def test_sequences_refuse_a_split_by_class_and_take_the_others():
    data = replace(small(), targets=torch.zeros(12, 5, dtype=torch.int64), test_targets=torch.zeros(1, 5).long())
    with pytest.raises(ValueError, match="choose iid, quantity_skew or natural"):
        build(data, {"name": "dirichlet", "alpha": 1}, 3)
    assert build(data, "iid", 3).num_clients == 3
