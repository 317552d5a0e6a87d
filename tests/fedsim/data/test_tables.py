"""What people have becomes a data set: frames, dictionaries, other libraries' sets, files of numbers, mapped files."""

from __future__ import annotations

import warnings
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from fedsim import pages
from fedsim.compose import compose
from fedsim.data import build, from_arrays, from_samples, from_table, load
from fedsim.data.federated import given_out
from fedsim.tasks.supervised import by_client

FRAME = pd.DataFrame(
    {"age": [30, 41, 52, 63], "dose": [0.5, 1.0, 1.5, 2.0], "site": ["b", "a", "b", "b"], "gain": [1.25, 2, 3, 4.5]}
)


def test_a_frame_gives_measurements_numbers_and_clients_by_name() -> None:
    data = from_table(FRAME, "gain", client="site", test_fraction=0.0)
    assert data.inputs.tolist() == [[30, 0.5], [41, 1.0], [52, 1.5], [63, 2.0]] and data.inputs.dtype == torch.float32
    assert data.targets.tolist() == [1.25, 2, 3, 4.5] and data.num_classes == 1
    assert data.groups.tolist() == [1, 0, 1, 1] and data.group_names == ("a", "b")
    both = from_table(FRAME, ["gain", "dose"], features=["age"], test_fraction=0.0)
    assert both.targets[0].tolist() == [1.25, 0.5] and both.inputs.tolist() == [[30], [41], [52], [63]]


def test_columns_of_lists_make_dictionaries_and_without_a_target_the_next_tokens() -> None:
    columns = {"input_ids": [[4, 5, 6], [7, 8, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]], "topic": [0, 1]}
    data = from_table(
        datasets.Dataset.from_dict(columns), None, features=["input_ids", "attention_mask"], test_fraction=0
    )
    assert set(data.inputs) == {"input_ids", "attention_mask"} and data.inputs["input_ids"].dtype == torch.int64
    assert data.targets.tolist() == [[5, 6, -100], [8, -100, -100]] and data.num_classes == 9
    classes = from_table(columns, "topic", test=columns)
    assert classes.targets.tolist() == [0, 1] == classes.test_targets.tolist()


class Pairs(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixels": torch.full((2, 2), float(i)), "age": 20 + i, "labels": i % 2}


def test_a_torch_data_set_is_read_once_from_its_first_sample_to_its_last() -> None:
    data = from_samples(Pairs(), clients=["x", "y", "x"], test_fraction=0.0)
    assert data.inputs["pixels"][:, 0, 0].tolist() == [0, 1, 2] and data.inputs["age"].tolist() == [20, 21, 22]
    assert data.targets.tolist() == [0, 1, 0] and data.groups.tolist() == [0, 1, 0]
    plain = torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4) % 2)
    assert from_samples(plain, plain).test_inputs.tolist() == torch.eye(4).tolist()


def three() -> tuple[Any, ...]:
    return np.eye(4), np.array([0, 1, 0, 1]), ["p", "q", "p", "q"]


def torchs() -> Any:
    return torch.utils.data.TensorDataset(torch.eye(10), torch.arange(10) % 2)


def a_frame() -> Any:
    return FRAME


def test_a_function_of_ones_own_may_give_clients_too_or_a_torch_data_set() -> None:
    assert load(f"{__name__}:three").group_names == ("p", "q")
    assert len(load(f"{__name__}:torchs").test_targets) == 2
    with pytest.raises(ValueError, match="returned DataFrame; .* fedsim.data.from_table"):
        load(f"{__name__}:a_frame")


@pytest.mark.parametrize(
    ("table", "given", "message"),
    [
        (FRAME, {"target": "gains"}, "no column 'gains', it has age, dose, site, gain"),
        (FRAME, {"target": "gain"}, "column 'site' holds .*, not numbers; drop it or encode it"),
        ({"a": [1.0]}, {"target": "a"}, "no column is left for features"),
        (3, {"target": "a"}, "expected a DataFrame, a Hugging Face Dataset or a mapping"),
        ({"a": [[1.0]], "b": [0.5]}, {"target": None, "features": "a"}, "without targets they must be tokens"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_name(table: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_table(table, **given)


def test_clients_hold_out_the_rows_that_are_given_as_theirs() -> None:
    x, owners = np.arange(6.0)[:, None], ["a", "b", "b", "c", "c", "c"]
    given = {"x_test": [[10.0], [11], [12], [13]], "y_test": [0, 1, 0, 1], "test_clients": ["c", "a", "d", "c"]}
    data = build(from_arrays(x, [0, 1, 0, 1, 0, 1], **given, clients=owners), "natural")
    held = given_out(data)
    assert data.client_names == ("a", "b", "c", "d") and data.num_examples.tolist() == [1, 2, 3, 0]
    ends = held.offsets.tolist()
    mine = [held.inputs[a:b, 0].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    assert mine == [[11], [], [10, 13], [12]]
    assert build(from_arrays(x, [0, 1, 0, 1, 0, 1], **given, clients=owners), "iid", 2).test_owners is None
    with pytest.raises(ValueError, match="test_clients need clients"):
        from_arrays(x, [0, 1, 0, 1, 0, 1], **given)


def hospitals(path: str) -> dict[str, Any]:
    return {
        "rounds": 1,
        "task": {"name": "regression", "dataset": {"name": "npz", "path": path}, "model": "logistic"},
        "partition": "natural",
        "strategy": "fedavg",
        "evaluate": {"every": 1},
    }


def test_a_clients_own_file_may_hold_what_it_holds_out(tmp_path: Any) -> None:
    for k in range(3):
        x = np.full((4, 2), k, dtype=np.float32)
        np.savez(tmp_path / f"h{k}.npz", x=x, y=x[:, 0], x_test=x[: k + 1], y_test=x[: k + 1, 1])
    run = compose(hospitals(str(tmp_path)), "test")
    task = run.experiment.task
    assert task.holds_out and task.held.num_examples.tolist() == [1, 2, 3]
    assert task.held.targets.tolist() == [0, 1, 1, 2, 2, 2]
    run.close()
    with pytest.raises(ValueError, match="data.client_test: the data says already what each client holds out"):
        compose(hospitals(str(tmp_path)) | {"data": {"client_test": 0.2}}, "test")
    np.savez(tmp_path / "test.npz", x=x, y=x[:, 0])
    with pytest.raises(ValueError, match=r"test.npz: clients' own files hold x_test already"):
        load({"name": "npz", "path": str(tmp_path)})


def test_tables_in_files_keep_numbers(tmp_path: Any) -> None:
    FRAME.drop(columns="site").to_csv(tmp_path / "a.csv", index=False)
    data = load({"name": "csv", "path": str(tmp_path / "a.csv"), "label": "gain", "test_fraction": 0})
    assert data.targets.tolist() == [1.25, 2, 3, 4.5] and data.inputs[1].tolist() == [41, 1.0]
    several = {"name": "csv", "path": str(tmp_path / "a.csv"), "label": ["gain", "dose"], "test_fraction": 0}
    assert load(several).targets[3].tolist() == [4.5, 2.0]
    (tmp_path / "a.csv").write_text("f,label\n1,0\n2,1\n,1\n")
    with pytest.raises(ValueError, match="column 'f' has 1 missing values, the first in row 2"):
        load({"name": "csv", "path": str(tmp_path / "a.csv")})
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match=r"a.csv: cannot be read as CSV"):
        load({"name": "csv", "path": str(tmp_path / "a.csv")})
    np.savez(tmp_path / "a.npz", x=np.zeros((0, 2)), y=np.zeros(0, int))
    with pytest.raises(ValueError, match=r"a.npz: the data set is empty"):
        load({"name": "npz", "path": str(tmp_path / "a.npz")})


def test_a_row_that_is_not_finite_is_counted_as_in_the_file() -> None:
    x = np.ones((50, 2))
    x[37, 1] = np.nan  # among the rows to train on it would be another one
    with pytest.raises(ValueError, match="inputs: row 37 holds NaN"):
        from_arrays(x, np.arange(50) % 2)


@pytest.mark.parametrize(
    ("labels", "missing"), [([1, 2, 3], "up to 3, but no row has class 0,"), ([0, 1, 5], "class 2, 3, 4,")]
)
def test_labels_that_leave_classes_out_are_said(labels: list[int], missing: str) -> None:
    x, y = np.random.default_rng(0).normal(size=(30, 3)), np.array(labels * 10)
    config = {
        "task": {"name": "classification", "dataset": f"{__name__}:kept", "model": "logistic"},
        "clients": {"count": 3},
        "strategy": "fedavg",
    }
    KEPT.update(x=x, y=y)
    with pytest.warns(UserWarning, match=missing):
        compose(config, "test").close()
    KEPT.update(num_classes=6)  # who says how many there are means it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compose(config, "test").close()
    KEPT.clear()


KEPT: dict[str, Any] = {}


def kept() -> Any:
    return from_arrays(**KEPT)


def test_more_clients_than_samples_are_said() -> None:
    KEPT.update(x=np.eye(6), y=np.arange(6) % 2)
    config = {
        "task": {"name": "classification", "dataset": f"{__name__}:kept", "model": "logistic"},
        "clients": {"count": 50},
        "strategy": "fedavg",
    }
    with pytest.warns(UserWarning, match="clients.count: 50 clients on 4 samples, so at least 46 of them have none"):
        compose(config, "test").close()
    KEPT.clear()


def test_a_mapped_file_is_not_copied_where_memory_has_no_room(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr(pages, "room_for", lambda nbytes: False)
    with pytest.raises(ValueError, match="no room to copy 0.0 GiB of inputs, .* give x_test and y_test"):
        from_arrays(mapped, np.arange(40) % 2)
    data = build(from_arrays(mapped, np.arange(40) % 2, test_fraction=0.0), "iid", 4)
    assert data.inputs.data_ptr() == mapped.ctypes.data
    here, there = by_client(data), data.order
    assert here.inputs.data_ptr() == mapped.ctypes.data
    monkeypatch.undo()
    moved = by_client(data)
    assert torch.equal(moved.inputs, data.inputs[there]) and moved.inputs.data_ptr() != mapped.ctypes.data
