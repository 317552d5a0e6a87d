"""Image sets that need no account and, where they are installed, no network: digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.data.arrays import from_arrays
from fedsim.data.dataset import Dataset
from fedsim.files import write_whole

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts the files
HOME = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
# MD5 of the four files as their authors publish them (github.com/zalandoresearch/fashion-mnist, README)
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
MEAN, STD = 0.2860, 0.3530  # of the training pixels, the customary figures
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_TIMEOUT_SECONDS = 60


def digits() -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, bundled with scikit-learn: needs no download.

    Pixels are scaled to [0, 1] and shaped [1, 8, 8]. A fifth of every class is held out, the same rows in every run.
    """
    table = _digits_table()
    data = from_arrays((table[:, :-1] / 16).reshape(-1, 1, 8, 8), table[:, -1].astype(int), origin="digits")
    return replace(data, class_names=tuple("0123456789"), notes=("Pixels 0 to 16 were divided by 16.",))


@cache
def _digits_table() -> np.ndarray:
    """[1797, 65]: pixels and label. Kept, for working out its numbers is a third of composing a small experiment."""
    return np.loadtxt(_sklearn() / "datasets" / "data" / "digits.csv.gz", delimiter=",")


def _sklearn() -> Path:
    """Where scikit-learn is installed: reading its file takes a tenth of the time that importing it does."""
    found = find_spec("sklearn")
    assert found is not None and found.submodule_search_locations, "a dependency"
    return Path(found.submodule_search_locations[0])


def fashion_mnist(*, root: str | None = None, download: bool = True) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 images of clothes, 28 x 28, ten classes.

    Xiao, Rasul, Vollgraf. Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms.
    arXiv:1708.07747. The four files are looked for in `root`, `root/fashion-mnist` and `root/FashionMNIST/raw`, then
    where Debian's package dataset-fashion-mnist puts them, then fetched once into `root` or the user's cache.

    Args:
        root: the folder of the configuration's `data.root`.
        download: whether they may be fetched.

    Returns:
        inputs [60000, 1, 28, 28], normalised with the customary mean .2860 and deviation .3530.

    Raises:
        ValueError: if the files are not there and cannot be fetched, or are damaged.
    """
    own = [Path(root), Path(root) / "fashion-mnist", Path(root) / "FashionMNIST" / "raw"] if root else []
    cache = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedsim"
    cache /= "fashion-mnist"
    folder = next((d for d in [*own, DEBIAN] if any((d / name).exists() for name in CHECKSUMS)), cache)
    missing = [name for name in CHECKSUMS if not (folder / name).exists()]
    if folder == cache and missing:
        if not download:
            raise ValueError(f"fashion_mnist: no files in {', '.join(map(str, [*own, DEBIAN, cache]))}; {_WAY_OUT}")
        for name in missing:
            _fetch(HOME + name, folder / name, CHECKSUMS[name])
    train, test, origin = _read_pair(folder, "train"), _read_pair(folder, "t10k"), f"fashion_mnist in {folder}"
    data = from_arrays(*train, *test, num_classes=10, origin=origin)
    scaled = f"Pixels were divided by 255, then standardised: mean {MEAN}, deviation {STD}."
    return replace(data, class_names=CLASSES, notes=(scaled,))


_WAY_OUT = (
    "install Debian's package dataset-fashion-mnist (apt install dataset-fashion-mnist), or put the four *-ubyte.gz "
    "files into a folder and name it in the key data.root"
)


def _read_pair(folder: Path, part: str) -> tuple[Tensor, np.ndarray]:
    images, labels = folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or y.ndim != 1:
        raise ValueError(
            f"{images}: expected images [n, 28, 28] and labels [n], got {list(x.shape)} and {list(y.shape)}; {_WAY_OUT}"
        )
    if len(x) != len(y):
        raise ValueError(f"{images}: {len(x)} images but {len(y)} labels in {labels.name}; {_WAY_OUT}")
    scaled = torch.from_numpy(x.astype(np.float32)).div_(255).sub_(MEAN).div_(STD)
    return scaled.unsqueeze(1), y.astype(np.int64)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes, the format of MNIST and its kin.

    The head is two zero bytes, the type (8: unsigned byte), the number of axes and each axis as a big-endian
    32-bit integer; the values follow.

    Raises:
        ValueError: if the file is missing, unreadable, truncated, too long or of another type.
    """
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; {_WAY_OUT}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as gzip ({error}); delete it and {_WAY_OUT}") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes, it starts with {raw[:4].hex()}; {_WAY_OUT}")
    axes = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=min(axes, (len(raw) - 4) // 4), offset=4))
    values = len(raw) - 4 - 4 * axes
    if len(shape) != axes or values != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path}: {values} values do not fill the shape {list(shape)} it declares; {_WAY_OUT}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _fetch(url: str, target: Path, md5: str) -> None:
    """Download to `target`, which appears only when the checksum fits."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"fashion_mnist: cannot fetch {url} ({error}); {_WAY_OUT}") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(f"fashion_mnist: {url} has MD5 {found}, expected {md5}: a damaged copy; {_WAY_OUT}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error}); free some space or name another data.root") from None
