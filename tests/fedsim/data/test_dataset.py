"""Arrays become data sets, and held-out rows are a fair share."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.data.arrays import from_arrays, hold_out


def test_the_held_out_share_is_the_same_in_every_class():
    targets = torch.tensor([0] * 50 + [1] * 10 + [7] * 5)
    train, test = hold_out(targets, 0.2)
    assert targets[test].bincount(minlength=8).tolist() == [10, 2, 0, 0, 0, 0, 0, 1]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(65))


def test_holding_out_nothing_and_sequences():
    assert len(hold_out(torch.tensor([0, 1]), 0)[1]) == 0
    assert len(hold_out(torch.zeros(10, 3, dtype=torch.int64), 0.3)[1]) == 3


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(fraction):
    with pytest.raises(ValueError, match=r"test_fraction must be in \[0, 1\)"):
        hold_out(torch.tensor([0, 1]), fraction)


def test_arrays_with_a_test_part_are_taken_as_they_are():
    data = from_arrays(np.eye(3), [0, 1, 2], np.ones((1, 3)), [1], clients=["b", "a", "b"])
    assert data.inputs.tolist() == torch.eye(3).tolist() and data.num_classes == 3
    assert data.groups is not None and data.groups.tolist() == [1, 0, 1] and data.group_names == ("a", "b")


def test_without_a_test_part_a_fifth_is_held_out_and_keys_follow_their_rows():
    x = np.arange(100.0)[:, None]
    data = from_arrays(x, np.arange(100) % 2, clients=np.arange(100) // 10)
    assert len(data.inputs) == 80 and len(data.test_inputs) == 20
    assert data.groups is not None and torch.equal(data.groups, data.inputs[:, 0].long() // 10)


def test_num_classes_counts_the_test_labels_and_can_be_given():
    assert from_arrays(np.eye(2), [0, 1], np.ones((1, 2)), [4]).num_classes == 5
    assert from_arrays(np.eye(2), [0, 1], test_fraction=0, num_classes=9).num_classes == 9
    with pytest.raises(ValueError, match="label of row 1 is 1, but labels must be 0 to 0"):
        from_arrays(np.eye(2), [0, 1], test_fraction=0, num_classes=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.eye(3), [0, 1]), "3 inputs but 2 labels"),
        ((np.eye(2), [0, 1], np.eye(2)), "must be given together"),
        ((np.array([[0.0], [np.nan]]), [0, 1]), "holds NaN"),
        ((np.zeros((0, 2)), np.zeros(0, dtype=int)), "is empty"),
        ((np.eye(2), [0, 1], np.ones((1, 3)), [0]), "they must agree"),
        ((np.eye(2), [0.0, float("inf")]), "labels: row 1 holds NaN or infinity"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_arrays(*arguments, origin="mine")
    assert str(caught.value).startswith("mine")


def test_groups_are_checked():
    data = from_arrays(np.eye(3), [0, 1, 2], test_fraction=0, clients=[0, 1, 1])
    for change, message in (
        ({"group_names": None}, "one name per natural client"),
        ({"groups": torch.tensor([0, 1])}, "one entry for each of 3 rows"),
        ({"groups": torch.tensor([0, 1, 2])}, "0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(data, **change).check("mine")


def test_a_one_hot_matrix_is_the_same_as_bytes_and_as_numbers():
    y = np.arange(40) % 8
    as_bytes, as_numbers = (from_arrays(np.eye(8)[y].astype(kind), y) for kind in (np.uint8, np.float32))
    assert torch.equal(as_bytes.inputs, as_numbers.inputs) and not as_bytes.notes
