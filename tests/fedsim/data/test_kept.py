"""A process that makes many runs on one data set reads it once."""

from __future__ import annotations

import gc
import weakref

import numpy as np

from fedsim.config import Given
from fedsim.data import build
from fedsim.data.sources import kept, load


def test_inside_the_last_data_set_read_stays_and_no_other() -> None:
    with kept():
        first = load("digits")
        assert load({"name": "digits"}) is first
        one = load({"name": "blobs", "num_examples": 30, "shape": [4]}, seed=1)
        assert load({"name": "blobs", "num_examples": 30, "shape": [4]}, seed=1) is one
        assert load({"name": "blobs", "num_examples": 30, "shape": [4]}, seed=2) is not one
        assert load("digits") is not first
    assert load("digits") is not load("digits")


def test_the_split_is_that_of_a_data_set_read_anew() -> None:
    with kept():
        splits = [build("digits", {"name": "dirichlet", "alpha": 0.5}, 10, seed) for seed in (0, 1, 0)]
    alone = build("digits", {"name": "dirichlet", "alpha": 0.5}, 10, 0)
    assert splits[0].order.equal(alone.order) and splits[2].order.equal(alone.order)
    assert not splits[1].order.equal(alone.order) and splits[0].inputs.equal(alone.inputs)


def test_what_made_the_data_stays_as_well_or_another_function_could_get_its_place_and_pass_for_it() -> None:
    def arrays() -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((10, 1), np.float32), np.arange(10) % 2

    there = weakref.ref(arrays)
    with kept():
        load({"name": Given.object((), arrays)})
        del arrays
        gc.collect()
        assert there() is not None
    gc.collect()
    assert there() is None
