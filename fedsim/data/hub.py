"""Data sets of the Hugging Face hub and of torchvision, through their own libraries (the extra `hub`).

Letters: n samples.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fedsim.data.arrays import from_arrays
from fedsim.data.checks import one_line
from fedsim.data.dataset import Dataset

_TEXT_WAY_OUT = "turn it into numbers in a Python factory, task.dataset: mypkg.mymodule:my_factory"


def huggingface(
    *,
    path: str,
    root: str | None = None,
    configuration: str | None = None,
    features: str = "image",
    label: str = "label",
    client: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    standardize: bool = True,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
) -> Dataset:
    """Any Hugging Face data set of images or numbers, by its name on the hub or a local folder (extra: hub).

    Args:
        path: such as `ylecun/mnist`, or a folder of files that the library reads.
        root: where downloads are kept, the configuration's `data.root`; by default the library's own cache.
        configuration: the library's name of the subset, where a data set has several.
        features: the column of images or lists of numbers.
        label: the column of classes, integers from 0.
        client: the column of client keys, for the natural partition.
        train_split: the split to train on.
        test_split: the split that is held out; null holds out `test_fraction` of the training rows.
        standardize: shift and scale images per channel to mean 0 and deviation 1 over the training rows.
        num_classes: by default one more than the largest label.
        test_fraction: used when test_split is null.

    Raises:
        ValueError: if the library, the data set, a split or a column is missing, or rows differ in shape.
    """
    origin = f"huggingface {path}"
    wanted = [features, label, *([client] if client else [])]
    images, (x, y, *keys) = _columns(path, configuration, train_split, root, wanted, origin)
    x_test = y_test = None
    if test_split:
        _, (x_test, y_test, *_) = _columns(path, configuration, test_split, root, wanted, origin)
    data = from_arrays(
        x,
        y,
        x_test,
        y_test,
        clients=keys[0] if keys else None,
        num_classes=num_classes,
        test_fraction=test_fraction,
        images=images,
        origin=origin,
    )
    return _standardized(data) if images and standardize else data


def _columns(
    path: str, configuration: str | None, split: str, root: str | None, wanted: list[str], origin: str
) -> tuple[bool, list[np.ndarray]]:
    """(whether the first of the wanted columns holds images, these columns)."""
    datasets = _require("datasets", "huggingface")
    try:
        table = datasets.load_dataset(path, configuration, split=split, cache_dir=root)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{origin}: cannot load split '{split}' ({one_line(error)}); check the name, the splits and "
            f"the network, or name a local folder as task.dataset.path"
        ) from None
    for name in wanted:
        if name not in table.column_names:
            raise ValueError(f"{origin}: no column '{name}', it has {', '.join(table.column_names)}")
    rows = table.select_columns(wanted).with_format("numpy")[:]
    x, *rest = (rows[name] for name in wanted)
    if x.dtype.kind not in "fiub":
        raise ValueError(f"{origin}: inputs are {x.dtype}, either text or rows of different shapes; {_TEXT_WAY_OUT}")
    images = isinstance(table.features[wanted[0]], datasets.Image)
    return images, [_channels_first(x) if images else x, *rest]


def torchvision(
    *,
    dataset: str,
    root: str | None = None,
    download: bool = True,
    standardize: bool = True,
    num_classes: int | None = None,
) -> Dataset:
    """Any torchvision classification set with a training and a test part, such as CIFAR10 (extra: hub).

    Args:
        dataset: the name of the class in torchvision.datasets.
        root: the folder to read from and download to, the configuration's `data.root`; ./data by default.
        download: whether it may be fetched.
        standardize: shift and scale images per channel to mean 0 and deviation 1 over the training rows.
        num_classes: by default one more than the largest label.

    Raises:
        ValueError: if the library or the data set is missing, or images differ in size.
    """
    known = _require("torchvision.datasets", "torchvision")
    found = getattr(known, dataset, None)
    if not inspect.isclass(found):
        raise ValueError(f"torchvision: no data set '{dataset}'; see the classes of torchvision.datasets")
    build: Any = found
    parameters = inspect.signature(build).parameters
    if not {"train", "split"} & set(parameters):
        raise ValueError(f"torchvision: {dataset} has no training and test part; use a Python factory instead")
    parts: list[np.ndarray] = []
    for name in ("train", "test"):
        chosen: dict[str, object] = {"train": name == "train"} if "train" in parameters else {"split": name}
        if "download" in parameters:
            chosen["download"] = download
        try:
            parts += _pixels(build(root or "data", **chosen), f"torchvision {dataset}")
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"torchvision: cannot load {dataset} from {root or 'data'} ({one_line(error)}); check the network, put "
                f"the files there and name the folder in data.root, or load it in a Python factory"
            ) from None
    data = from_arrays(*parts, num_classes=num_classes, images=True, origin=f"torchvision {dataset}")
    return _standardized(data) if standardize else data


def _pixels(samples: Iterable[tuple[object, int]], origin: str) -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a torchvision set."""
    images, labels = zip(*((np.asarray(image), label) for image, label in samples), strict=True)
    sizes = len({image.shape for image in images})
    if sizes > 1:
        raise ValueError(f"{origin}: images have {sizes} different sizes; resize them in a Python factory")
    return _channels_first(np.stack(images)), np.asarray(labels)


def _standardized(data: Dataset) -> Dataset:
    """Images with every channel at mean 0 and deviation 1 over the training rows."""
    assert isinstance(data.inputs, torch.Tensor) and isinstance(data.test_inputs, torch.Tensor)
    axes = [0, *range(2, data.inputs.ndim)]
    deviation, mean = torch.std_mean(data.inputs, dim=axes, keepdim=True)
    for part in (data.inputs, data.test_inputs):
        part.sub_(mean).div_(deviation.clamp(min=1e-6))
    scaled = "Pixels were divided by 255, then each channel standardised by the training rows."
    return replace(data, notes=(scaled,))


def _channels_first(x: np.ndarray) -> np.ndarray:
    """Images [n, height, width] or [n, height, width, channels] as [n, channels, height, width]."""
    return x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _require(module: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # the latter two: built for another version of torch
        raise ValueError(
            f"{source} needs the library {module.split('.')[0]} ({error}); install fedsim-stacks[hub] beside this torch"
        ) from None
