"""Loading by name, by mapping and by the user's own import path."""

import inspect
import sys
import types

import numpy as np
import pytest
import torch

from fedsim.data.arrays import from_arrays
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.sources import DATASETS, entry, load

X, Y = np.eye(4), np.array([0, 1, 0, 1])


@pytest.fixture
def mine(monkeypatch):
    """The user's module; set its functions as attributes."""
    module = types.ModuleType("my_data")
    monkeypatch.setitem(sys.modules, "my_data", module)
    return module


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_has_a_one_line_description_and_keyword_parameters(name):
    entry = DATASETS[name]
    first, second, *_ = [*(entry.__doc__ or "").splitlines(), "", ""]
    assert len(first) > 20 and first.endswith((".", "(extra: hub).")) and not second
    assert all(p.kind is p.KEYWORD_ONLY for p in inspect.signature(entry).parameters.values())


def test_a_name_a_mapping_and_a_data_set_itself():
    blobs = {"name": "blobs", "num_examples": 12, "num_test": 3, "shape": [2, 2]}
    data = load(blobs)
    assert isinstance(data, Dataset) and data.inputs.shape == (12, 2, 2)
    assert load(data) is data
    assert load("digits").num_classes == 10
    assert blobs["name"] == "blobs"  # the configuration is left as it was


def test_root_and_seed_are_passed_on_unless_the_entry_gives_its_own(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    assert load({"name": "npz", "path": "a.npz"}, root=str(tmp_path)).num_classes == 2
    assert torch.equal(load("blobs", seed=5).inputs, load({"name": "blobs", "seed": 5}, seed=1).inputs)
    assert not torch.equal(load("blobs", seed=5).inputs, load("blobs", seed=6).inputs)


def test_the_resolved_fields_are_recorded_with_their_defaults():
    resolved = entry({"name": "blobs", "spread": 2.0}, "task.dataset").resolved
    assert resolved["name"] == "blobs" and resolved["spread"] == 2.0 and resolved["num_examples"] == 2000


@pytest.mark.parametrize("result", [(X, Y), (torch.eye(4), torch.tensor(Y)), (X, Y, X[:1], Y[:1])])
def test_a_factory_may_return_arrays(mine, result):
    mine.make = lambda: result
    data = load("my_data:make")
    assert isinstance(data, Dataset) and data.num_classes == 2
    assert len(data.inputs) == (4 if len(result) == 4 else 4 - len(data.test_inputs))


def test_a_factory_takes_its_fields_and_the_runs_root_and_seed(mine):
    def make(*, scale: float, seed: int, root: str | None) -> Dataset:
        assert (seed, root) == (7, "here")
        return from_arrays(X * scale, Y, test_fraction=0)

    mine.make = make
    data = load({"name": "my_data:make", "scale": 3.0}, root="here", seed=7)
    assert float(data.inputs.max()) == 3
    with pytest.raises(ValueError, match="task.dataset.scale.*'wide'"):
        load({"name": "my_data:make", "scale": "wide"}, root="here", seed=7)


def test_a_factory_may_return_federated_data(mine):
    federated = FederatedData(
        inputs=torch.eye(4),
        targets=torch.tensor(Y),
        offsets=torch.tensor([0, 2, 4]),
        order=torch.arange(4),
        test_inputs=torch.eye(4),
        test_targets=torch.tensor(Y),
        num_classes=2,
    )
    mine.make = lambda: federated
    assert load("my_data:make") is federated


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "my_data:make returned NoneType; return a Dataset"),
        ((X,), "my_data:make returned tuple; return"),
        ((X * np.nan, Y), "my_data:make: .* holds NaN"),
        ((X, Y[:2]), "my_data:make: 4 inputs but 2 labels"),
    ],
)
def test_what_a_factory_must_not_return(mine, result, message):
    mine.make = lambda: result
    with pytest.raises(ValueError, match=message):
        load("my_data:make")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown name 'digit'; did you mean 'digits'"),
        ({"name": "blobs", "spred": 1}, "spred: unknown key; did you mean 'spread'"),
        ({"name": "blobs", "spread": "wide"}, "spread: expected a number, got 'wide'"),
        ({"name": "npz"}, "path: missing"),
        ({"path": "x"}, "expected a name"),
        ("no_such_module_here:make", "can't import 'no_such_module_here:make'"),
        ("json:no_such_function", "no 'no_such_function'"),
    ],
)
def test_a_bad_entry_is_refused_by_key(spec, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(spec)
    assert "task.dataset" in str(caught.value)
