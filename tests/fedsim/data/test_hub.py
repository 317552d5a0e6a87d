"""Hugging Face data read offline from a folder; torchvision by a stand-in with its interface."""

import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.data.hub import huggingface, torchvision
from fedsim.data.tables import from_table

RED = np.zeros((2, 3, 3), dtype=np.uint8) + np.array([255, 0, 0], dtype=np.uint8)  # height 2, width 3, 3 channels


@pytest.fixture
def folder(tmp_path) -> Path:
    """A local data set with a training and a test split of number lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    for split, n in (("train", 6), ("test", 2)):
        table = pa.table(
            {"v": [[float(i), 1.0] for i in range(n)], "label": [i % 2 for i in range(n)], "who": ["a", "b"] * (n // 2)}
        )
        pq.write_table(table, tmp_path / "set" / f"{split}-00000.parquet")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_local_hugging_face_folder_is_read(folder):
    data = huggingface(path=str(folder / "set"), root=str(folder / "cache"), features="v", client="who")
    assert data.inputs.tolist() == [[float(i), 1.0] for i in range(6)] and data.targets.tolist() == [0, 1] * 3
    assert data.test_inputs.tolist() == [[0.0, 1.0], [1.0, 1.0]]
    assert data.groups is not None and data.groups.tolist() == [0, 1] * 3 and data.group_names == ("a", "b")
    held = huggingface(path=str(folder / "set"), root=str(folder / "cache"), features="v", test_split=None)
    assert len(held.inputs) + len(held.test_inputs) == 6 and len(held.test_inputs) == 2


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_images_are_scaled_and_other_bytes_are_not(folder):
    import datasets
    from PIL import Image

    features = datasets.Features(
        image=datasets.Image(), v=datasets.Sequence(datasets.Value("uint8"), 2), label=datasets.Value("int64")
    )
    rows = {"image": [Image.fromarray(RED)] * 4, "v": [[255, 1]] * 4, "label": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "images" / "train-00000.parquet")
    read = {"path": str(folder / "images"), "root": str(folder / "cache"), "test_split": None, "test_fraction": 0.0}
    data = huggingface(**read, standardize=False)
    assert data.inputs.shape == (4, 3, 2, 3) and data.inputs[0, :, 0, 0].tolist() == [1, 0, 0]
    assert data.notes == ("Pixels were divided by 255.",)
    assert huggingface(**read, features="v").inputs.tolist() == [[255, 1]] * 4


@pytest.mark.filterwarnings("ignore")
def test_several_columns_of_a_set_saved_to_disk_are_a_dictionary(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {
        "input_ids": [[5, 6, 0], [7, 8, 9]] * 2,
        "attention_mask": [[1, 1, 0], [1, 1, 1]] * 2,
        "labels": [0, 1, 1, 0],
    }
    rows = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    names = ["input_ids", "attention_mask"]
    both = huggingface(path=str(tmp_path / "both"), features=names, label="labels")
    one = huggingface(path=str(tmp_path / "one"), features=names, label="labels", test_split=None, test_fraction=0.0)
    given = from_table(rows, "labels", features=names, test=rows.select([1]))
    for data in (both, one, given):
        assert {k: v.tolist() for k, v in data.inputs.items()} == {k: columns[k] for k in names}
        assert data.targets.tolist() == columns["labels"] and data.num_classes == 2
    for data in (both, given):
        assert {k: v.tolist() for k, v in data.test_inputs.items()} == {k: columns[k][1:2] for k in names}
    tokens = huggingface(path=str(tmp_path / "both"), features=names, label=None)
    assert tokens.targets.tolist() == [[6, -100, -100], [8, 9, -100]] * 2
    for options, text in (
        ({"features": ["input_ids", "mask"]}, "no column 'mask', it has input_ids, attention_mask, labels"),
        ({"features": names, "test_split": "dev"}, r"cannot load split 'dev' \(it has train, test\)"),
        ({"features": names, "path": str(tmp_path / "one")}, r"cannot load split 'test' \(it has train\)"),
    ):
        with pytest.raises(ValueError, match=text):
            huggingface(**{"path": str(tmp_path / "both"), "label": "labels", **options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": "w"}, "no column 'w', it has v, label, who"),
        ({"features": "v", "train_split": "dev"}, "cannot load split 'dev'"),
        ({"features": "who"}, "either text or rows of different shapes; .*Python factory"),
    ],
)
def test_what_the_hub_does_not_have_is_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        huggingface(path=str(folder / "set"), root=str(folder / "cache"), **arguments)


class InMemory:
    """Keeps arrays and gives one pair at an index, as CIFAR10 does."""

    def __init__(self, root, train=True, download=False):
        self.data = np.stack([RED, RED * 0] * (4 if train else 1))
        self.targets = [0, 1] * (4 if train else 1)

    def __getitem__(self, index):
        return self.data[index], self.targets[index]


class Listed:
    """Gives one pair at a time, with splits, as Flowers102 does."""

    def __init__(self, root, split="train"):
        self.pairs = [(RED, 0), (RED * 0, 1)] * (4 if split == "train" else 1)

    def __iter__(self):
        return iter(self.pairs)


class Ragged(Listed):
    def __init__(self, root, split="train"):
        self.pairs = [(RED, 0), (RED[:1], 1)]


class Missing:
    def __init__(self, root, train=True, download=False):
        raise RuntimeError("Dataset not found or corrupted")


class Single:
    def __init__(self, root):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("torchvision.datasets")
    for kind in (InMemory, Listed, Ragged, Missing, Single):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", ["InMemory", "Listed"])
def test_torchvision_images_become_channels_first_and_standard(name):
    data = torchvision(dataset=name, standardize=False)
    assert data.inputs.shape == (8, 3, 2, 3) and data.test_inputs.shape == (2, 3, 2, 3)
    assert data.inputs[0, :, 0, 0].tolist() == [1, 0, 0] and data.targets.tolist() == [0, 1] * 4
    scaled = torchvision(dataset=name)
    assert abs(float(scaled.inputs[:, 0].mean())) < 1e-6
    assert float(scaled.inputs[:, 0].std()) == pytest.approx(1)
    assert scaled.inputs[:, 1:].abs().max() == 0  # a constant channel is not blown up


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", "no data set 'CIFAR11'"),
        ("Single", "has no training and test part"),
        ("Ragged", "images have 2 different sizes"),
        ("Missing", "cannot load Missing from data .*corrupted.*data.root"),
    ],
)
def test_what_torchvision_cannot_give_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        torchvision(dataset=name)


@pytest.mark.parametrize(
    ("module", "load"),
    [
        ("datasets", lambda: huggingface(path="ylecun/mnist")),
        ("torchvision.datasets", lambda: torchvision(dataset="CIFAR10")),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, module, load):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs the library {module.split('.')[0]} .*install fedsim-stacks\[hub\]"):
        load()
