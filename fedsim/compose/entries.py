"""Table entries inside a section: `{name: ..., fields}` or a bare name becomes an object, and a resolved section.

What needs something that is not known while its section is read (a data set its folder, a model its sizes, devices
their number) becomes a function of that instead, and is built later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fedsim.aggregate import AGGREGATORS, PRE_AGGREGATORS, PreAggregator
from fedsim.clients.byzantine import ATTACKS
from fedsim.compose.problems import Site
from fedsim.compress import COMPRESSORS
from fedsim.config import Reader, as_import_path
from fedsim.data import DATASETS
from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData
from fedsim.data.sources import as_dataset
from fedsim.optim import Optimizer
from fedsim.optim import build as build_optimizer
from fedsim.optim.foreign import ForeignOptimizer
from fedsim.params import Layout
from fedsim.sim.devices import DEVICES
from fedsim.tasks.models import MODELS


def dataset(reader: Reader, key: str, value: Any) -> tuple[Callable[[Site], Dataset | FederatedData], Any]:
    """A data set, to be read once the folder and the seed are known."""
    target, name, rest = reader.named(DATASETS, value, key)
    from_site = [k for k in ("root", "seed") if k not in rest]
    arguments, resolved = reader.bind(target, rest, key, from_site)

    def read(site: Site) -> Dataset | FederatedData:
        made = reader.call(target, {"root": site.root, "seed": site.seed, **arguments}, key)
        try:
            return as_dataset(made, name)
        except ValueError as e:
            raise reader.error(key, str(e)) from e

    return read, {"name": name, **resolved}


def model(reader: Reader, key: str, value: Any) -> tuple[Callable[[FederatedData], nn.Module], Any]:
    """A model, to be made once the data say what it takes and gives."""
    target, name, rest = reader.named(MODELS, value, key)
    arguments, resolved = reader.bind(target, rest, key, ("input_shape", "num_classes"))

    def make(data: FederatedData) -> nn.Module:
        sizes = {"input_shape": tuple(data.inputs.shape[1:]), "num_classes": data.num_classes}
        module = reader.call(target, {**arguments, **sizes}, key)
        if not isinstance(module, nn.Module):
            raise reader.error(key, f"{name} gave a {type(module).__name__}, not a torch.nn.Module")
        return module

    return make, {"name": name, **resolved}


def device_model(reader: Reader, key: str, value: Any) -> tuple[Callable[[int], Any], Any]:
    """A device model, to be built once the number of clients is known."""
    target, name, rest = reader.named(DEVICES, value, key)
    arguments, resolved = reader.bind(target, rest, key, ("count",))
    return lambda count: reader.call(target, {**arguments, "count": count}, key), {"name": name, **resolved}


def optimizer(
    reader: Reader, key: str, spec: Any, layout: Layout, check: Callable[[Optimizer], None]
) -> tuple[Optimizer, Any]:
    """A rule that `check` accepts, for vectors of this layout."""
    spec = {"name": spec} if isinstance(spec, str) else spec
    name = str(spec.get("name")) if isinstance(spec, Mapping) else ""
    if ":" in name:
        return _foreign(reader, key, spec, layout, check)
    if hint := as_import_path(name):
        raise reader.error(key, f"unknown optimizer {name!r}{hint}")
    made = build_optimizer(spec, layout, reader=reader, key=key)
    try:
        check(made)
    except ValueError as e:
        raise reader.error(key, str(e)) from e
    return made, dict(spec)


def _foreign(
    reader: Reader, key: str, spec: Mapping[str, Any], layout: Layout, check: Callable[[Any], None]
) -> tuple[Any, Any]:
    """Any class of torch optimizers by import path, with one warning."""
    arguments = {k: v for k, v in spec.items() if k != "name"}
    make = reader.imported(spec["name"], f"{key}.name")
    try:
        made = ForeignOptimizer(make, arguments, layout)
        check(made)
    except ValueError as e:
        raise reader.error(key, str(e)) from e
    warnings.warn(f"{key}: {spec['name']} is not batched, clients step one after the other", stacklevel=2)
    return made, dict(spec)


def _from(table: Mapping[str, Callable[..., Any]]) -> Callable[[Reader, str, Any], tuple[Any, Any]]:
    return lambda reader, key, value: reader.build_entry(table, value, key, {})


def pre_aggregators(reader: Reader, key: str, value: Any) -> tuple[tuple[PreAggregator, ...], Any]:
    """A list of entries; the resolved section is the list of theirs."""
    if not isinstance(value, list | tuple):
        raise reader.error(key, f"expected a list such as [nnm, {{name: clipping, norm: 1}}], got {value!r}")
    made = [reader.build_entry(PRE_AGGREGATORS, entry, f"{key}[{i}]", {}) for i, entry in enumerate(value)]
    return tuple(built for built, _ in made), [resolved for _, resolved in made]


def _always() -> str:
    """Every client can be reached at any time."""
    return "always"


AVAILABILITY: dict[str, Callable[..., Any]] = {"always": _always}

NESTED: dict[str, Callable[[Reader, str, Any], tuple[Any, Any]]] = {
    "dataset": dataset,
    "model": model,
    "optimizer": lambda reader, key, value: (value, value),  # built by `optimizer` once the layout is known
    "device": device_model,
    "availability": _from(AVAILABILITY),
    "aggregator": _from(AGGREGATORS),
    "pre_aggregators": pre_aggregators,
    "attack": _from(ATTACKS),
    "compressor": _from(COMPRESSORS),
}
