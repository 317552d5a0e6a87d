"""Conversions of outside arrays."""

import numpy as np
import pytest
import torch

from fedsim.data.checks import as_inputs, as_keys, as_targets


def test_only_declared_pixels_are_scaled_and_wide_integers_are_tokens():
    pixels = np.array([[0, 255]], dtype=np.uint8)
    assert as_inputs(pixels, "x", images=True).tolist() == [[0.0, 1.0]]
    assert as_inputs(pixels, "x").tolist() == [[0.0, 255.0]] and as_inputs(pixels, "x").dtype == torch.float32
    with pytest.raises(ValueError, match="x: images are pixels of type uint8, these are float64; convert or scale"):
        as_inputs(pixels / 255, "x", images=True)
    assert as_inputs(np.array([[0.5]]), "x").dtype == torch.float32
    assert as_inputs(np.array([[7]], dtype=np.int16), "x").dtype == torch.int64
    assert as_inputs([[1.0, 2.0]], "x").tolist() == [[1.0, 2.0]]
    assert as_inputs(torch.tensor([[True]]), "x").tolist() == [[1.0]]


def test_read_only_arrays_are_copied_and_writable_ones_shared():
    fixed = np.ones((2, 2), dtype=np.float32)
    fixed.setflags(write=False)
    as_inputs(fixed, "x").zero_()
    assert fixed.sum() == 4
    own = np.ones((2, 2), dtype=np.float32)
    as_inputs(own, "x").zero_()
    assert own.sum() == 0


@pytest.mark.parametrize(
    ("read", "array", "message"),
    [
        (as_inputs, np.array([["a"]]), "expected numbers, got type"),
        (as_inputs, [[1.0], [1.0, 2.0]], "give every row the same shape"),
        (as_inputs, np.zeros(3), "one row per sample"),
        (as_inputs, np.zeros((2, 2), dtype=complex), "type complex128"),
        (as_targets, np.array([0.0, np.nan, 1.0]), "row 1 holds NaN"),
        (as_targets, np.zeros(()), "a single number"),
        (as_targets, ["cat", "dog"], "expected integer classes or numbers"),
        (as_inputs, {"a": [1, 2], "b": [[1.0]]}, "one row per sample, but there are 'a' 2, 'b' 1"),
        (as_inputs, {}, "there is nothing"),
    ],
)
def test_other_arrays_are_refused_by_name(read, array, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(array, "f.npz: key 'x'")
    assert str(caught.value).startswith("f.npz: key 'x'")


def test_keys_are_numbered_in_sorted_order():
    codes, names = as_keys(np.array([30, 4, 30]), 3, "client")
    assert codes.tolist() == [1, 0, 1] and names == ("4", "30")
    codes, names = as_keys(np.array(["b", "a"], dtype=object), 2, "client")
    assert codes.tolist() == [1, 0] and names == ("a", "b")


@pytest.mark.parametrize("keys", [np.array([0.5, 1.0]), np.array([None, "a"]), np.array([1, 2, 3])])
def test_keys_that_do_not_name_one_client_per_row_are_refused(keys):
    with pytest.raises(ValueError, match="client key"):
        as_keys(keys, 2, "client")
