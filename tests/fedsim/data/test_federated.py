"""Rows of a stack, counts by class, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.federated import FederatedData, held_out


def federation() -> FederatedData:
    """Five samples of three classes; client 0 owns rows 3 and 1, client 1 none, client 2 rows 0, 4, 4."""
    return FederatedData(
        inputs=torch.arange(10.0).view(5, 2),
        targets=torch.tensor([0, 1, 2, 1, 0]),
        offsets=torch.tensor([0, 2, 2, 5]),
        order=torch.tensor([3, 1, 0, 4, 4]),
        test_inputs=torch.zeros(1, 2),
        test_targets=torch.tensor([2]),
        num_classes=3,
    )


def test_rows_are_looked_up_by_client_and_position():
    rows = federation().rows(torch.tensor([2, 0]), torch.tensor([[0, 2], [1, 0]]))
    assert rows.tolist() == [[0, 4], [1, 3]]


def test_positions_beyond_a_clients_last_sample_stay_with_that_client():
    assert federation().rows(torch.tensor([0]), torch.tensor([[0, 1, 2, 99]])).tolist() == [[3, 1, 1, 1]]


def test_a_client_without_samples_still_gives_valid_rows():
    data = federation()
    last = replace(data, offsets=torch.tensor([0, 5, 5]))
    first = replace(data, offsets=torch.tensor([0, 0, 5]))
    for d, i in ((data, 1), (last, 1), (first, 0)):
        rows = d.rows(torch.tensor([i]), torch.arange(4)[None])
        assert rows.shape == (1, 4) and 0 <= int(rows.min()) and int(rows.max()) < 5


def test_class_counts_by_hand():
    data = federation()
    assert data.num_clients == 3
    assert data.num_examples.tolist() == [2, 0, 3]
    assert data.class_counts().tolist() == [[0, 2, 0], [0, 0, 0], [3, 0, 0]]


def test_class_counts_of_sequences_count_every_element():
    data = replace(federation(), targets=torch.tensor([[0, 0], [1, 2], [0, 0], [2, 2], [1, 1]]))
    assert data.class_counts().tolist() == [[0, 1, 3], [0, 0, 0], [2, 4, 0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_class_counts_equal_a_loop_over_clients(sizes, random):
    n, m = 8, sum(sizes)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    order = torch.tensor([random.randrange(n) for _ in range(m)], dtype=torch.int64)
    targets = torch.tensor([random.randrange(4) for _ in range(n)])
    data = FederatedData(
        inputs=torch.zeros(n, 1),
        targets=targets,
        offsets=offsets,
        order=order,
        test_inputs=torch.zeros(0, 1),
        test_targets=targets[:0],
        num_classes=4,
    )
    expected = [
        torch.bincount(targets[order[a:b]], minlength=4).tolist()
        for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    assert data.class_counts().tolist() == expected


def test_a_million_clients_are_two_tensors():
    n = 1_000_000
    data = FederatedData(
        inputs=torch.zeros(10, 1),
        targets=torch.arange(10),
        offsets=torch.arange(n + 1),
        order=torch.arange(n) % 10,
        test_inputs=torch.zeros(0, 1),
        test_targets=torch.zeros(0, dtype=torch.int64),
        num_classes=10,
    )
    data.check()
    assert data.class_counts().sum(0).tolist() == [n // 10] * 10
    assert data.rows(torch.tensor([999_999]), torch.tensor([[0]])).tolist() == [[9]]


def test_good_data_passes_and_comes_back():
    data = federation()
    assert data.check() is data
    moved = data.to("cpu")
    assert torch.equal(moved.order, data.order) and moved.num_classes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.tensor([[0.0, 1.0]] * 4 + [[float("nan"), 0.0]])}, "row 4 holds NaN"),
        ({"test_inputs": torch.full((1, 2), float("inf"))}, "test inputs: row 0 holds NaN or infinity"),
        ({"targets": torch.tensor([0, 1, 3, 1, 0])}, "label of row 2 is 3, but labels must be 0 to 2"),
        ({"targets": torch.tensor([0, -1, 1, 1, 0])}, "label of row 1 is -1"),
        ({"targets": torch.tensor([0, 1])}, "5 training inputs but 2 labels"),
        ({"targets": torch.tensor([0.0, 1, 2, 1, 0]).double()}, "must be int64 classes or float32"),
        ({"inputs": torch.zeros(5, 2, dtype=torch.float64)}, "must be float32"),
        ({"test_inputs": torch.zeros(1, 3)}, "must agree"),
        ({"inputs": torch.zeros(0, 2), "targets": torch.zeros(0, dtype=torch.int64)}, "is empty"),
        ({"order": torch.tensor([3, 1, 0, 4, 5])}, "rows 0 to 5, but the rows are 0 to 4"),
        ({"offsets": torch.tensor([0, 3, 2, 5])}, "never fall"),
        ({"offsets": torch.tensor([0, 2, 4])}, "end at the 5 entries"),
        ({"offsets": torch.tensor([0])}, "no clients"),
        ({"offsets": torch.tensor([0.0, 5.0])}, "one-dimensional int64"),
        ({"offsets": torch.zeros(4, dtype=torch.int64), "order": torch.zeros(0, dtype=torch.int64)}, "none of the 3"),
        ({"client_names": ("a",)}, "1 client names for 3 clients"),
    ],
)
def test_bad_data_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(federation(), **change).check("mine.npz")
    assert str(caught.value).startswith("mine.npz: ")


def test_every_client_holds_out_a_share_and_keeps_one_sample_at_least():
    n = 60
    data = replace(
        federation(),
        inputs=torch.arange(2.0 * n).view(n, 2),
        targets=torch.arange(n) % 3,
        offsets=torch.tensor([0, 40, 40, 41, 43, 60]),
        order=torch.arange(n).flip(0),
    )
    left, held = held_out(data, 0.25, seed=1)
    assert held.num_examples.tolist() == [10, 0, 0, 0, 4] and left.num_examples.tolist() == [30, 0, 1, 2, 13]
    for i in range(5):
        own = set(data.order[data.offsets[i] : data.offsets[i + 1]].tolist())
        kept = set(left.order[left.offsets[i] : left.offsets[i + 1]].tolist())
        gone = held.inputs[held.offsets[i] : held.offsets[i + 1], 0].div(2).long()
        assert kept | set(gone.tolist()) == own and not kept & set(gone.tolist())
        assert torch.equal(held.targets[held.offsets[i] : held.offsets[i + 1]], data.targets[gone])
    assert held_out(data, 0.25, seed=2)[1].inputs.tolist() != held.inputs.tolist()
    assert left.check() is left


def test_what_a_client_holds_out_does_not_depend_on_the_others_data():
    data = replace(
        federation(), inputs=torch.arange(40.0)[:, None], targets=torch.zeros(40).long(), order=torch.arange(40)
    )
    together = held_out(replace(data, offsets=torch.tensor([0, 25, 40])), 0.3, seed=1)[1]
    alone = held_out(replace(data, offsets=torch.tensor([0, 0, 15]), order=torch.arange(25, 40)), 0.3, seed=1)[1]
    assert together.inputs[together.offsets[1] :].tolist() == alone.inputs.tolist() and len(alone.inputs) == 4
