"""Data sets of the Hugging Face hub and of torchvision, through their own libraries (the extra `hub`).

Letters: n samples.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fedsim.data.arrays import from_arrays
from fedsim.data.checks import one_line
from fedsim.data.dataset import Dataset
from fedsim.data.tables import from_table

_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves in a folder, of several splits or of one
_TEXT_WAY_OUT = "turn it into numbers in a Python factory, task.dataset: mypkg.mymodule:my_factory"


def huggingface(
    *,
    path: str,
    root: str | None = None,
    configuration: str | None = None,
    features: str | list[str] = "image",
    label: str | None = "label",
    client: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    standardize: bool = True,
    num_classes: int | None = None,
    test_fraction: float = 0.2,
) -> Dataset:
    """Any Hugging Face data set of images, numbers or tokens, by its name on the hub or a local folder (extra: hub).

    Args:
        path: such as `ylecun/mnist`, or a folder: of files that the library reads, or what `save_to_disk` wrote.
        root: where downloads are kept, the configuration's `data.root`; by default the library's own cache.
        configuration: the library's name of the subset, where a data set has several.
        features: the column of images or lists of numbers; or several columns, such as [input_ids, attention_mask]:
            then samples are dictionaries, or vectors where every column holds one number, as in `from_table`.
        label: the column of targets; null where they are the next tokens.
        client: the column of client keys, for the natural partition.
        train_split: the split to train on.
        test_split: the split that is held out; null, as for a set that was saved without splits, holds out
            `test_fraction` of the training rows.
        standardize: shift and scale images per channel to mean 0 and deviation 1 over the training rows.
        num_classes: by default one more than the largest label.
        test_fraction: used when test_split is null.

    Raises:
        ValueError: if the library, the data set, a split or a column is missing, or rows differ in shape.
    """
    origin = f"huggingface {path}"
    names = [features] if isinstance(features, str) else features
    wanted = [*names, *([label] if label else [])]
    rows = _split(path, configuration, train_split, root, origin)
    held = _split(path, configuration, test_split, root, origin) if test_split else None
    columns = _columns(rows, [*wanted, *([client] if client else [])], names, origin)
    images = isinstance(features, str) and _is_image(rows, features)
    data = from_table(
        columns,
        label,
        features=features,
        client=client,
        test=None if held is None else _columns(held, wanted, names, origin),
        num_classes=num_classes,
        test_fraction=test_fraction,
        images=images,
        origin=origin,
    )
    return _standardized(data) if images and standardize else data


def _split(path: str, configuration: str | None, split: str, root: str | None, origin: str) -> Any:
    """A split of a data set of the library's."""
    datasets = _require("datasets", "huggingface")
    try:
        if any((Path(path) / name).is_file() for name in _SAVED):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, dict) else {"train": saved}  # as the library calls rows without a name
            if split not in splits:
                raise ValueError(f"it has {', '.join(splits)}")
            return splits[split]
        return datasets.load_dataset(path, configuration, split=split, cache_dir=root)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{origin}: cannot load split '{split}' ({one_line(error)}); check the name, the splits and "
            f"the network, or name a local folder as task.dataset.path"
        ) from None


def _columns(table: Any, wanted: list[str], features: list[str], origin: str) -> dict[str, np.ndarray]:
    """The wanted columns by name."""
    for name in wanted:
        if name not in table.column_names:
            raise ValueError(f"{origin}: no column '{name}', it has {', '.join(table.column_names)}")
    rows = table.select_columns(wanted).with_format("numpy")[:]
    for name in features:
        if rows[name].dtype.kind not in "fiub":
            found = f"column '{name}' holds {rows[name].dtype}, either text or rows of different shapes"
            raise ValueError(f"{origin}: {found}; {_TEXT_WAY_OUT}")
        if _is_image(table, name):
            rows[name] = _channels_first(rows[name])
    return dict(rows)


def _is_image(table: Any, column: str) -> bool:
    return isinstance(table.features[column], _require("datasets", "huggingface").Image)


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
