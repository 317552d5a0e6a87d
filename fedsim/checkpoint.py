"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `round-000020/` with `tensors.safetensors` and `state.json`: strategy state, client memory,
job counters (the streams' keys), clock, jobs in flight with their broadcasts and computed replies, and the ledger.
It is written beside its final name and renamed, so that it exists whole or not at all. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.config import ConfigError

KEEP = 2


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Plain JSON data for a tree of dataclasses, mappings, sequences, numbers and tensors; tensors go aside by path.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu").contiguous().clone()
        return {"$tensor": path}
    if is_dataclass(value) and not isinstance(value, type):
        body = {f.name: pack(getattr(value, f.name), tensors, f"{path}.{f.name}") for f in fields(value) if f.init}
        return {"$class": type(value).__qualname__, "fields": body}
    if isinstance(value, Mapping):
        return {"$map": [[k, pack(v, tensors, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "$tuple" if isinstance(value, tuple) else "$list"
        return {kind: [pack(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"$float": value.hex()}
    raise TypeError(
        f"a checkpoint can't hold a {type(value).__name__} (at {path}); use tensors, numbers or dataclasses"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor], classes: Mapping[str, type]) -> Any:
    """The inverse of `pack`; only the dataclasses given by name can come out."""
    if not isinstance(packed, dict):
        return packed
    if "$tensor" in packed:
        return tensors[packed["$tensor"]].clone()
    if "$class" in packed:
        made = {k: unpack(v, tensors, classes) for k, v in packed["fields"].items()}
        return classes[packed["$class"]](**made)
    if "$map" in packed:
        return {k: unpack(v, tensors, classes) for k, v in packed["$map"]}
    if "$tuple" in packed:
        return tuple(unpack(v, tensors, classes) for v in packed["$tuple"])
    if "$list" in packed:
        return [unpack(v, tensors, classes) for v in packed["$list"]]
    return float.fromhex(packed["$float"])


def classes_of(value: Any) -> dict[str, type]:
    """The dataclasses that a state is made of, found in its values and in its type hints."""
    found: dict[str, type] = {}

    def look(kind: Any) -> None:
        for argument in typing.get_args(kind):
            look(argument)
        if isinstance(kind, type) and is_dataclass(kind) and kind.__qualname__ not in found:
            found[kind.__qualname__] = kind
            for hint in typing.get_type_hints(kind).values():
                look(hint)

    def walk(v: Any) -> None:
        look(type(v))
        if is_dataclass(v) and not isinstance(v, type):
            for f in fields(v):
                walk(getattr(v, f.name))
        elif isinstance(v, Mapping):
            for item in v.values():
                walk(item)
        elif isinstance(v, list | tuple):
            for item in v:
                walk(item)

    walk(value)
    return found


def save(folder: Path, round: int, state: Mapping[str, Any]) -> Path:
    """Write `folder/round-NNNNNN` whole, then drop all but the newest checkpoints.

    Raises:
        ConfigError: if the disk is full or cannot be written, or the state holds what a checkpoint can't; earlier
            checkpoints stay.
    """
    tensors: dict[str, Tensor] = {}
    final = folder / f"round-{round:06d}"
    try:
        tree = pack(dict(state), tensors)
    except TypeError as e:
        raise ConfigError(f"{final}: {e}") from e
    part = folder / f".part-{round:06d}"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(tensors, part / "tensors.safetensors")
        (part / "state.json").write_text(json.dumps(tree), encoding="utf-8")
        for file in part.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
    except Exception as e:
        shutil.rmtree(part, ignore_errors=True)
        raise ConfigError(
            f"{final}: can't write the checkpoint: {e}; make room or set --out elsewhere, then --resume"
        ) from e
    for old in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    whole = [p for p in folder.glob("round-*") if (p / "state.json").is_file() and p.name[6:].isdigit()]
    return sorted(whole, key=lambda p: int(p.name[6:]))


def load(path: Path, classes: Mapping[str, type]) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        ConfigError: if the files are damaged or belong to another kind of run.
    """
    with _damage(path):
        return dict(unpack(_tree(path), load_file(path / "tensors.safetensors"), classes))


def peek(path: Path, key: str) -> Any:
    """One entry without tensors or dataclasses, for a look at a checkpoint that may belong to another run.

    Raises:
        ConfigError: if the file is damaged.
    """
    with _damage(path):
        return unpack(dict(_tree(path)["$map"])[key], {}, {})


def _tree(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "state.json").read_text(encoding="utf-8")))


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        raise ConfigError(
            f"{path}: can't read this checkpoint ({type(e).__name__}: {e}); delete it to resume from an earlier one"
        ) from e


def to_device(value: Any, device: torch.device) -> Any:
    """The same tree with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: to_device(getattr(value, f.name), device) for f in fields(value) if f.init})
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, device) for v in value)
    return value
