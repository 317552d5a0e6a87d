"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `round-000020/` with `tensors.safetensors` and `state.json`: strategy state, client memory,
job counters (the streams' keys), clock, jobs in flight with their broadcasts and computed replies, and the ledger.
`SHA256SUMS`, written last, tells whether they are what was written (`sha256sum -c` reads it too). The folder is made
beside its final name and renamed, so that it exists whole or not at all. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.config import ConfigError
from fedsim.files import sync

KEEP = 2
FILES = ("state.json", "tensors.safetensors")
SUMS_FILE = "SHA256SUMS"
MISSING = object()


class Damaged(ConfigError):
    """A checkpoint that cannot be gone on from; the message says why."""


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Plain JSON data for a tree of dataclasses, mappings, sequences, numbers and tensors; tensors go aside by path.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu").contiguous().clone()
        return {"$tensor": path} if value.is_cpu else {"$tensor": path, "on_device": True}
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


def unpack(
    packed: Any, tensors: Mapping[str, Tensor], classes: Mapping[str, type], device: str | torch.device = "cpu"
) -> Any:
    """The inverse of `pack`: tensors of its own, on the device if they were on one, else on the host.

    Only the dataclasses given by name can come out.
    """

    def made(p: Any) -> Any:
        if not isinstance(p, dict):
            return p
        if "$tensor" in p:
            return tensors[p["$tensor"]].to(device if "on_device" in p else "cpu", copy=True)
        if "$class" in p:
            return classes[p["$class"]](**{k: made(v) for k, v in p["fields"].items()})
        if "$map" in p:
            return {k: made(v) for k, v in p["$map"]}
        if "$tuple" in p:
            return tuple(made(v) for v in p["$tuple"])
        if "$list" in p:
            return [made(v) for v in p["$list"]]
        return float.fromhex(p["$float"])

    return made(packed)


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
    """Write `folder/round-NNNNNN` whole, then drop all but the newest checkpoints up to this one.

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
        for left in folder.glob(".part-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        (part / "state.json").write_text(json.dumps(tree), encoding="utf-8")
        save_file(tensors, part / "tensors.safetensors")
        (part / SUMS_FILE).write_bytes(_sums(part))
        for path in part.iterdir():
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        sync(folder)
    except Exception as e:
        shutil.rmtree(part, ignore_errors=True)
        raise ConfigError(
            f"{final}: can't write the checkpoint: {e}; make room or set --out elsewhere, then --resume"
        ) from e
    kept = [p for p in checkpoints(folder) if _round(p) <= round][-KEEP:]
    for old in checkpoints(folder):
        if old not in kept:  # later ones belong to what was given up when the run went on from an earlier one
            shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, sound or not, oldest first."""
    return sorted((p for p in folder.glob("round-*") if p.name[6:].isdigit()), key=_round)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are what was written."""

    path: Path
    entries: dict[str, Any]
    tensors: dict[str, Tensor]

    def take(self, key: str, classes: Mapping[str, type] | None = None, device: str | torch.device = "cpu") -> Any:
        """One entry on a device, its dataclasses made from those given by name.

        Raises:
            Damaged: if it does not hold the entry, or a dataclass of it has other fields by now.
        """
        try:
            return unpack(self.entries[key], self.tensors, classes or {}, device)
        except Exception as e:
            raise _unreadable(self.path, e) from e


def load(path: Path) -> Saved:
    """What `save` wrote.

    Raises:
        Damaged: if a file is not what was written.
    """
    try:
        if (path / SUMS_FILE).read_bytes() != _sums(path):
            raise ValueError(f"its files do not match {SUMS_FILE}")
        tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Saved(path, dict(tree["$map"]), load_file(path / "tensors.safetensors"))
    except Exception as e:
        raise _unreadable(path, e) from e


def _sums(path: Path) -> bytes:
    """Lines of `sha256sum`."""
    lines = []
    for name in FILES:
        with (path / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines).encode()


def _round(path: Path) -> int:
    return int(path.name[6:])


def _unreadable(path: Path, e: Exception) -> Damaged:
    return Damaged(f"{path.name}: can't be read ({type(e).__name__}: {e})")


def misfit(saved: Any, fresh: Any, sizes: tuple[int, ...], path: str = "state") -> str | None:
    """Where a saved state is not of a fresh one's kind, or None: another class, or a vector of another shape or type.

    Args:
        saved: from a checkpoint.
        fresh: what the strategy begins with today.
        sizes: of the model's vectors; only floats that begin as [..., size] are compared, others may change by round.
        path: the name of `fresh`, for the answer.
    """
    if isinstance(fresh, Tensor):
        sized = fresh.is_floating_point() and fresh.shape[-1:] in [(size,) for size in sizes]
        if sized and isinstance(saved, Tensor) and (saved.shape, saved.dtype) != (fresh.shape, fresh.dtype):
            found, wanted = (f"{list(t.shape)} {t.dtype}" for t in (saved, fresh))
            return f"{path} is {found} where the run has {wanted}"
        return f"{path} is missing" if sized and saved is MISSING else None
    if is_dataclass(fresh) and not isinstance(fresh, type):
        if type(saved) is not type(fresh):
            return f"{path} is a {type(saved).__name__} where the run has a {type(fresh).__name__}"
        pairs = [(f.name, getattr(saved, f.name), getattr(fresh, f.name)) for f in fields(fresh)]
    elif isinstance(fresh, Mapping) and isinstance(saved, Mapping):
        pairs = [(str(k), saved.get(k, MISSING), v) for k, v in fresh.items()]
    elif isinstance(fresh, list | tuple) and isinstance(saved, list | tuple):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(saved, fresh, strict=False))]
    else:
        return None
    wrong = (misfit(a, b, sizes, f"{path}.{name}") for name, a, b in pairs)
    return next(filter(None, wrong), None)
