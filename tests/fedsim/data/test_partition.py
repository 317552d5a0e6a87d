"""Who gets which rows: conservation, the recipes' limits, and flwr-datasets' partitioners as an outside judge."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.dataset import Dataset
from fedsim.data.partition import (
    PARTITIONS,
    Classes,
    Dirichlet,
    DirichletClient,
    Iid,
    Natural,
    Partition,
    QuantitySkew,
    Shards,
)

ONCE = [
    Iid(),
    Dirichlet(alpha=0.3),
    Dirichlet(alpha=0),
    DirichletClient(alpha=0.3),
    DirichletClient(alpha=0),
    Shards(),
    Shards(shards_per_client=5),
    QuantitySkew(alpha=0.5),
    QuantitySkew(alpha=0),
    Natural(),
]
REPEATING = [DirichletClient(alpha=0.3, with_replacement=True)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rows(targets: np.ndarray, num_classes: int, groups: np.ndarray | None = None) -> Dataset:
    """Training rows with these classes."""
    y = torch.from_numpy(np.asarray(targets, dtype=np.int64))
    own = None if groups is None else torch.from_numpy(np.asarray(groups, dtype=np.int64))
    return Dataset(inputs=y, targets=y, test_inputs=y, test_targets=y, num_classes=num_classes, groups=own)


def counts(partition: Partition, labels: np.ndarray, num_clients: int, seed: int = 0, num_classes: int = 10):
    """[N, K] samples of each class at each client."""
    order, offsets = partition(rows(labels, num_classes), num_clients, rng(seed))
    owner = np.repeat(np.arange(num_clients), np.diff(offsets))
    return np.bincount(owner * num_classes + labels[order], minlength=num_clients * num_classes).reshape(
        num_clients, -1
    )


def entropy(table: np.ndarray) -> np.ndarray:
    """Label entropy in nats of each client that has samples."""
    table = table[table.sum(1) > 0]
    p = table / table.sum(1, keepdims=True)
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(1)


def test_every_entry_of_the_table_is_tried_here():
    tried = {type(p) for p in (*ONCE, *REPEATING)} | {Classes}
    assert tried == set(PARTITIONS.values())


@pytest.mark.parametrize("partition", ONCE, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), num_clients=st.integers(1, 25), seed=st.integers(0, 99)
)
def test_every_row_goes_to_exactly_one_client(partition, labels, num_clients, seed):
    targets = np.array(labels)
    groups = np.arange(len(labels)) % num_clients
    order, offsets = partition(rows(targets, 5, groups), num_clients, rng(seed))
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert offsets[0] == 0 and offsets[-1] == len(labels) and len(offsets) == num_clients + 1
    assert (np.diff(offsets) >= 0).all()


@pytest.mark.parametrize("partition", [*ONCE, *REPEATING, Classes(classes_per_client=3)], ids=str)
def test_the_same_stream_gives_the_same_split_and_another_stream_another(partition):
    labels, groups = np.arange(300) % 10, np.arange(300) % 12
    one, same, other = (partition(rows(labels, 10, groups), 12, rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one[0], same[0]) and np.array_equal(one[1], same[1])
    assert isinstance(partition, Natural) or not np.array_equal(one[0], other[0])


def test_iid_sizes_differ_by_one_at_most():
    _, offsets = Iid()(rows(np.zeros(10), 1), 4, rng())
    assert sorted(np.diff(offsets).tolist()) == [2, 2, 3, 3]


@pytest.mark.parametrize(
    "partition", [Dirichlet(alpha=1e9), DirichletClient(alpha=1e9, with_replacement=True)], ids=str
)
def test_a_large_alpha_gives_everyone_the_mix_of_the_whole(partition):
    labels = np.repeat(np.arange(4), [4000, 4000, 4000, 4000])
    table = counts(partition, labels, 10, num_classes=4)
    # 400 of each class for each client; systematic rounding leaves one, independent draws a binomial spread
    room = 1 if isinstance(partition, Dirichlet) else 5 * np.sqrt(1600 * 0.25 * 0.75)
    assert np.abs(table - 400).max() <= room


def test_a_large_alpha_without_replacement_conserves_rows_and_nears_the_mix():
    table = counts(DirichletClient(alpha=1e9), np.repeat(np.arange(4), 4000), 10, num_classes=4)
    assert (table.sum(1) == 1600).all() and (table.sum(0) == 4000).all()
    assert np.abs(table - 400).max() <= 5 * np.sqrt(1600 * 0.25 * 0.75)


@pytest.mark.parametrize("alpha", [0, 1e-6])
def test_a_vanishing_alpha_gives_each_class_to_one_client(alpha):
    table = counts(Dirichlet(alpha=alpha), np.arange(1000) % 10, 50)
    assert ((table > 0).sum(0) == 1).all()


@pytest.mark.parametrize("alpha", [0, 1e-6])
def test_a_vanishing_alpha_gives_each_client_one_class_when_rows_are_drawn_again(alpha):
    table = counts(DirichletClient(alpha=alpha, with_replacement=True), np.arange(1000) % 10, 50)
    assert ((table > 0).sum(1) == 1).all() and (table.sum(1) == 20).all()
    assert (table > 0).any(0).sum() > 5


def test_class_wise_shares_have_dirichlet_mean_and_variance():
    # the share of one class at one client is Beta(a, a (N - 1)): mean 1/N, variance (N - 1) / (N^2 (N a + 1))
    n, alpha, num_clients = 20_000, 0.5, 5
    shares = np.concatenate([counts(Dirichlet(alpha=alpha), np.arange(n) % 10, num_clients, s) for s in range(40)])
    shares = shares.ravel() / (n / 10)
    variance = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    assert abs(shares.mean() - 1 / num_clients) < 1e-9  # rows are conserved
    draws = shares.reshape(-1, num_clients, 10)[:, 0]  # one client's shares are independent over classes and seeds
    standard_error = np.std((draws - 1 / num_clients) ** 2) / np.sqrt(draws.size)
    assert abs(draws.var() - variance) < 4 * standard_error


def test_rounding_favours_no_client_when_there_are_more_clients_than_rows():
    sizes = sum(counts(Dirichlet(alpha=1e6), np.zeros(10, dtype=int), 40, seed, 1)[:, 0] for seed in range(800))
    # each client expects 800 * 10 / 40 = 200 rows; a draw is 0 or 1, so the deviation is at most sqrt(800 / 4)
    assert np.abs(sizes - 200).max() < 4.5 * np.sqrt(800 * 0.25 * 0.75)


def test_client_wise_mixes_follow_the_dirichlet_when_rows_are_drawn_again():
    alpha, k = 0.5, 4
    table = counts(DirichletClient(alpha=alpha, with_replacement=True), np.arange(200_000) % k, 400, num_classes=k)
    shares = table / table.sum(1, keepdims=True)
    assert np.abs(shares.mean(0) - 1 / k).max() < 4 * np.sqrt((k - 1) / (k**2 * (k * alpha + 1)) / 400)
    # share of class 0: variance of Beta(a, a (k - 1)), plus 1/500 of binomial noise which is left to the tolerance
    assert shares[:, 0].var() == pytest.approx((k - 1) / (k**2 * (k * alpha + 1)), rel=0.15)


def test_scarce_classes_are_contested_fairly():
    # class 1 has a tenth of the rows its mixes ask for; early and late clients must get as much of it
    labels = np.repeat([0, 1], [3800, 200])
    table = sum(counts(DirichletClient(alpha=1.0), labels, 40, seed, 2)[:, 1] for seed in range(60)).astype(float)
    early, late = table[:20], table[20:]
    spread = np.sqrt(early.var() / 20 + late.var() / 20)
    assert abs(early.mean() - late.mean()) < 4 * spread


def test_rows_of_a_client_are_in_random_order():
    for partition in (Dirichlet(alpha=1e9), Shards(), DirichletClient(alpha=1e9), Classes(classes_per_client=2)):
        labels = np.repeat(np.arange(2), 500)
        order, offsets = partition(rows(labels, 2), 1, rng())
        first_half = labels[order[: offsets[1] // 2]].mean()
        assert 0.4 < first_half < 0.6


def test_shards_are_runs_of_the_sorted_labels():
    # 100 rows a class, 10 clients with 2 shards of 50: never more than two classes, 0, 50 or 100 rows of each
    table = counts(Shards(), np.arange(1000) % 10, 10)
    assert (table.sum(1) == 100).all() and set(np.unique(table)) <= {0, 50, 100}
    assert ((table > 0).sum(1) <= 2).all()


def test_classes_gives_exactly_that_many_and_shares_them_evenly():
    labels = np.arange(3000) % 10
    for k in (1, 3, 10):
        table = counts(Classes(classes_per_client=k), labels, 25)
        assert ((table > 0).sum(1) == k).all()
        assert (table.sum(0) == 300).all()  # every class has a holder
        for column in table.T:
            held = column[column > 0]
            assert held.max() - held.min() <= 1


def test_classes_without_rows_are_never_held():
    labels = np.repeat([1, 4], 50)
    table = counts(Classes(classes_per_client=2), labels, 5, num_classes=6)
    assert (table[:, [1, 4]] == 10).all()
    table = counts(DirichletClient(alpha=0), labels, 5, num_classes=6)
    assert (table.sum(0) == [0, 50, 0, 0, 50, 0]).all()


def test_quantity_skew_leaves_the_mix_alone():
    table = counts(QuantitySkew(alpha=0.5), np.arange(100_000) % 2, 10, num_classes=2)
    sizes = table.sum(1)
    assert sizes.max() > 3 * sizes.min()
    assert (np.abs(table[:, 0] - sizes / 2) <= 5 * np.sqrt(sizes) / 2 + 1).all()


def test_natural_follows_the_keys_and_keeps_the_order_of_rows():
    order, offsets = Natural()(rows(np.zeros(5), 1, np.array([2, 0, 2, 0, 2])), 3, rng())
    assert order.tolist() == [1, 3, 0, 2, 4] and offsets.tolist() == [0, 2, 2, 5]


def test_min_examples_is_met_or_refused():
    labels = np.arange(1000) % 10
    for partition in (Dirichlet(alpha=0.5, min_examples=20), QuantitySkew(alpha=1, min_examples=20)):
        assert np.diff(partition(rows(labels, 10), 10, rng())[1]).min() >= 20
    with pytest.raises(ValueError, match="needs 2000 rows, but there are 1000"):
        Dirichlet(alpha=0.5, min_examples=200)(rows(labels, 10), 10, rng())
    with pytest.raises(ValueError, match="none of 100 draws gave every one of 10 clients"):
        QuantitySkew(alpha=0.01, min_examples=50)(rows(labels, 10), 10, rng())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Dirichlet(alpha=-1), "dirichlet.alpha must be 0 or more and finite, got -1"),
        (lambda: DirichletClient(alpha=float("nan")), "dirichlet_client.alpha"),
        (lambda: QuantitySkew(alpha=float("inf")), "choose iid"),
        (lambda: Dirichlet(alpha=1, min_examples=-1), "dirichlet.min_examples must be 0 or more, got -1"),
        (lambda: Shards(shards_per_client=0), "shards_per_client must be 1 or more"),
        (lambda: Classes(classes_per_client=0), "classes_per_client must be 1 or more"),
        (
            lambda: Classes(classes_per_client=3)(rows(np.arange(20) % 2, 10), 4, rng()),
            "the data has 2 classes; lower it",
        ),
        (lambda: Natural()(rows(np.zeros(3), 1), 2, rng()), "the data names no clients"),
        (lambda: Natural()(rows(np.zeros(3), 1, np.arange(3)), 2, rng()), "the data has 3 clients, not 2"),
        (lambda: Shards()(rows(np.zeros((3, 4)), 1), 2, rng()), "sequences, which have none"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_sequences_can_be_dealt_by_row():
    for partition in (Iid(), QuantitySkew(alpha=1)):
        order, _ = partition(rows(np.zeros((30, 4)), 2), 3, rng())
        assert sorted(order.tolist()) == list(range(30))


def flower_counts(make, labels: np.ndarray, num_clients: int, seed: int) -> np.ndarray:
    """[N, 10] counts of one of flwr-datasets' partitioners on the same labels."""
    import datasets

    partitioner = make(num_clients, seed)
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels})
    parts = (np.asarray(partitioner.load_partition(i)["label"], dtype=int) for i in range(num_clients))
    return np.stack([np.bincount(part, minlength=10) for part in parts])


FLOWER = {
    "dirichlet": (
        Dirichlet(alpha=0.3),
        lambda p, n, s: p.DirichletPartitioner(n, "label", 0.3, min_partition_size=0, self_balancing=False, seed=s),
    ),
    "dirichlet, large alpha": (
        Dirichlet(alpha=10.0),
        lambda p, n, s: p.DirichletPartitioner(n, "label", 10.0, min_partition_size=0, self_balancing=False, seed=s),
    ),
    "dirichlet_client": (
        DirichletClient(alpha=1.0),
        lambda p, n, s: p.InnerDirichletPartitioner([120] * n, "label", 1.0, seed=s),
    ),
    "shards": (Shards(), lambda p, n, s: p.ShardPartitioner(n, "label", num_shards_per_partition=2, seed=s)),
    "classes": (
        Classes(classes_per_client=3),
        lambda p, n, s: p.PathologicalPartitioner(n, "label", 3, "first-deterministic", seed=s),
    ),
}


@pytest.mark.parametrize("name", FLOWER)
def test_splits_are_distributed_as_those_of_flwr_datasets(name):
    ours, theirs = FLOWER[name]
    labels, num_clients, seeds = np.sort(np.arange(1440) % 10), 12, 9
    with warnings.catch_warnings():  # theirs, which are not ours to mend
        warnings.simplefilter("ignore")
        pytest.importorskip("datasets")
        partitioner = pytest.importorskip("flwr_datasets.partitioner")
        judged = [
            flower_counts(lambda n, s: theirs(partitioner, n, s), labels, num_clients, seed) for seed in range(seeds)
        ]
    tables = ([counts(ours, labels, num_clients, seed) for seed in range(seeds)], judged)
    for statistic in (lambda t: entropy(t).mean(), lambda t: t.sum(1).std(), lambda t: (t > 0).sum(1).mean()):
        a, b = (np.array([statistic(t) for t in part]) for part in tables)
        standard_error = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / seeds)
        assert abs(a.mean() - b.mean()) <= 4 * standard_error + 1e-9, (a.mean(), b.mean(), standard_error)
