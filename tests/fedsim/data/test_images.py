"""Digits, Fashion-MNIST's files, and what happens when they are damaged or missing."""

import gzip
import hashlib
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedsim.data import images
from fedsim.data.images import CHECKSUMS, DEBIAN, digits, fashion_mnist, read_idx


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_set(folder: Path, n: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((n, 28, 28), 255)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(n))))
    return folder


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No installed copy, an empty cache, and a network that is down."""

    def down(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(images, "DEBIAN", tmp_path / "not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", down)
    return tmp_path


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    data = digits()
    found = torch.cat([data.inputs, data.test_inputs]).flatten(1) * 16
    rows = torch.cat([found, torch.cat([data.targets, data.test_targets])[:, None]], dim=1)
    expected = torch.tensor(np.column_stack([images, labels]), dtype=torch.float32)
    assert sorted(rows.tolist()) == sorted(expected.tolist())


def test_digits_are_whole_scaled_and_held_out_by_class():
    data = digits()
    assert data.inputs.shape == (1438, 1, 8, 8) and data.test_inputs.shape == (359, 1, 8, 8)
    assert float(data.inputs.min()) == 0 and float(data.inputs.max()) == 1
    everyone = torch.cat([data.targets, data.test_targets]).bincount()
    assert (data.test_targets.bincount() - everyone * 0.2).abs().max() <= 0.5
    assert torch.equal(digits().test_inputs, data.test_inputs)


@pytest.mark.skipif(not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_installed_fashion_mnist_is_complete_and_normalised():
    data = fashion_mnist()
    assert data.inputs.shape == (60_000, 1, 28, 28) and data.test_inputs.shape == (10_000, 1, 28, 28)
    assert data.targets.bincount().tolist() == [6000] * 10 and data.test_targets.bincount().tolist() == [1000] * 10
    assert abs(float(data.inputs.mean())) < 1e-3 and abs(float(data.inputs.std()) - 1) < 1e-3


@pytest.mark.parametrize("inside", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_the_root_folder_is_looked_at_first(tmp_path, inside):
    write_set(tmp_path / inside)
    data = fashion_mnist(root=str(tmp_path))
    assert data.targets.tolist() == [0, 1, 2, 3]
    assert torch.allclose(data.inputs, torch.tensor((1 - 0.2860) / 0.3530))


def test_files_are_fetched_once_and_only_with_the_right_checksum(alone, monkeypatch):
    source, fetched = write_set(alone / "home"), []

    def serve(url, timeout):
        fetched.append(url)
        return (source / url.rsplit("/", 1)[1]).open("rb")

    monkeypatch.setattr("urllib.request.urlopen", serve)
    with pytest.raises(ValueError, match=r"has MD5 .*, expected 8d4fb7e6c68d591d4c3dfef9ec88bf0d: a damaged copy"):
        fashion_mnist()
    assert not list((alone / "cache").rglob("*.gz"))
    sums = {name: hashlib.md5((source / name).read_bytes()).hexdigest() for name in CHECKSUMS}
    monkeypatch.setattr(images, "CHECKSUMS", sums)
    fetched.clear()
    assert len(fashion_mnist().inputs) == len(fashion_mnist().inputs) == 4
    assert len(fetched) == 4
    assert sorted(p.name for p in (alone / "cache" / "fedsim" / "fashion-mnist").iterdir()) == sorted(CHECKSUMS)
    (alone / "cache" / "fedsim" / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    fashion_mnist()
    assert len(fetched) == 5  # an interrupted download is completed, not repeated


@pytest.mark.parametrize("download", [True, False])
def test_offline_the_message_names_the_package_and_the_key(alone, download):
    with pytest.raises(ValueError, match=r"apt install dataset-fashion-mnist.*data\.root") as caught:
        fashion_mnist(download=download)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(alone, monkeypatch):
    (alone / "file").write_text("")
    content = write_set(alone / "home") / "train-images-idx3-ubyte.gz"
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: content.open("rb"))
    monkeypatch.setitem(images.CHECKSUMS, content.name, hashlib.md5(content.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"cannot be written .*data\.root"):
        fashion_mnist(root=str(alone / "file"))


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: cut(raw), "cannot be read as gzip"),
        (lambda raw: b"not gzip at all", "cannot be read as gzip"),
        (lambda raw: b"", "not an IDX file"),
        (lambda raw: raw[:20] + b"\xff" * 20 + raw[40:], "cannot be read as gzip"),
        (
            lambda raw: gzip.compress(b"\0\0\x0d\x03" + bytes(12)),
            "not an IDX file of unsigned bytes, it starts with 00000d03",
        ),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "do not fill the shape [4, 28, 28]"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "do not fill the shape"),
        (lambda raw: gzip.compress(b"\0\0\x08\x03\0\0"), "do not fill the shape"),
        (lambda raw: gzip.compress(idx(np.zeros((3, 28, 28)))), "3 images but 4 labels"),
        (lambda raw: gzip.compress(idx(np.zeros(4))), "expected images [n, 28, 28]"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, spoil, message):
    path = write_set(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        fashion_mnist(root=str(tmp_path))
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "data.root" in str(caught.value)


def test_a_missing_part_is_named(tmp_path):
    (write_set(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte.gz: missing"):
        fashion_mnist(root=str(tmp_path))


def test_idx_by_hand(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])))
    assert read_idx(path).tolist() == [[1, 2, 3], [4, 5, 6]]
