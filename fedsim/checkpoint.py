"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `round-000020/` with `tensors.safetensors` and `state.json`: strategy state, job counters (the
streams' keys), clock, jobs in flight with their broadcasts and computed replies, and the ledger. Clients' rows lie
beside it in `rows/`, in blocks that are named by their content: a block that has not changed is written once, and
every checkpoint that holds it refers to it. `SHA256SUMS`, written last, tells whether all these are what was written
(`sha256sum -c` reads it too). The folder is made beside its final name and renamed, so that it exists whole or not at
all; blocks go when no checkpoint refers to them any more. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedsim.config import ConfigError
from fedsim.files import put, sync

FILES = ("state.json", "tensors.safetensors")
SUMS_FILE = "SHA256SUMS"
ROWS, SUFFIX = "rows", ".safetensors"  # the folder of blocks, and their files
MISSING = object()


class Damaged(ConfigError):
    """A checkpoint that cannot be gone on from; the message says why."""


@dataclass(eq=False)
class Block:
    """Rows that have a file of their own, which checkpoints refer to for as long as the rows stay as they are.

    Args:
        rows: gives them, [n, ...].
        file: the name of what holds them, which tells its content; None where they have changed since.
    """

    rows: Callable[[], Tensor]
    file: str | None = None


@dataclass
class Packed:
    """What goes aside of a packed tree: tensors by their path, and blocks in the order in which they were met."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)


def pack(value: Any, aside: Packed, path: str = "") -> Any:
    """Plain JSON data for a tree of dataclasses, mappings, sequences, numbers, tensors and blocks.

    Args:
        value: the tree.
        aside: takes its tensors, of which those on the CPU are not copied, and its blocks.
        path: where it stands in a larger one.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Tensor):
        aside.tensors[path] = value.detach().to("cpu").contiguous()
        return {"$tensor": path} if value.is_cpu else {"$tensor": path, "on_device": True}
    if isinstance(value, Block):
        aside.blocks.append(value)
        return {"$block": len(aside.blocks) - 1}
    if is_dataclass(value) and not isinstance(value, type):
        body = {f.name: pack(getattr(value, f.name), aside, f"{path}.{f.name}") for f in fields(value) if f.init}
        return {"$class": type(value).__qualname__, "fields": body}
    if isinstance(value, Mapping):
        return {"$map": [[k, pack(v, aside, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "$tuple" if isinstance(value, tuple) else "$list"
        return {kind: [pack(v, aside, f"{path}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"$float": value.hex()}
    raise TypeError(
        f"a checkpoint can't hold a {type(value).__name__} (at {path}); use tensors, numbers or dataclasses"
    )


def unpack(packed: Any, aside: Packed, classes: Mapping[str, type], device: str | torch.device = "cpu") -> Any:
    """The inverse of `pack`: tensors of its own, on the device if they were on one, else on the host.

    Only the dataclasses given by name can come out.
    """

    def made(p: Any) -> Any:
        if not isinstance(p, dict):
            return p
        if "$tensor" in p:
            return aside.tensors[p["$tensor"]].to(device if "on_device" in p else "cpu", copy=True)
        if "$block" in p:
            return aside.blocks[p["$block"]]
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


def save(folder: Path, round: int, state: Mapping[str, Any], keep: int | None = 2) -> Path:
    """Write `folder/round-NNNNNN` whole, then drop all but the newest `keep` checkpoints up to this one.

    Raises:
        ConfigError: if the disk is full or cannot be written, or the state holds what a checkpoint can't; earlier
            checkpoints stay.
    """
    aside, final = Packed(), folder / f"round-{round:06d}"
    try:
        tree = pack(dict(state), aside)
    except TypeError as e:
        raise ConfigError(f"{final}: {e}") from e
    part = folder / f".part-{round:06d}"
    try:
        for left in folder.glob(".part-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        names = _save_blocks(aside.blocks, folder / ROWS)
        (part / "state.json").write_text(json.dumps({"entries": tree, "blocks": names}), encoding="utf-8")
        save_file(_apart(aside.tensors), part / "tensors.safetensors")
        (part / SUMS_FILE).write_bytes(_sums(part, FILES) + _sums_of_blocks(names))
        for path in part.iterdir():
            sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        sync(folder)
    except Exception as e:
        shutil.rmtree(part, ignore_errors=True)
        _drop_blocks(folder)
        raise ConfigError(
            f"{final}: can't write the checkpoint: {e}; make room or set --out elsewhere, then --resume"
        ) from e
    kept = [p for p in checkpoints(folder) if _round(p) <= round][-(keep or 0) :]  # [-0:] is all
    for old in checkpoints(folder):
        if old not in kept:  # later ones belong to what was given up when the run went on from an earlier one
            shutil.rmtree(old, ignore_errors=True)
    _drop_blocks(folder)
    return final


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where several lie in one storage, which a file of tensors may not hold."""
    out, taken = dict[str, Tensor](), set[int]()
    for name, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        out[name] = value.clone() if storage in taken else value
        taken.add(storage)
    return out


def _save_blocks(blocks: Sequence[Block], folder: Path) -> list[str]:
    """The names of the blocks' files in the folder, in which those are written that are not there."""
    there = _names(folder)
    for block in blocks:
        if block.file not in there:
            content = safetensors.torch.save({ROWS: block.rows().contiguous()})
            block.file = f"{hashlib.sha256(content).hexdigest()}{SUFFIX}"
            folder.mkdir(exist_ok=True)
            put(folder / block.file, content)
            there.add(block.file)
    if blocks:
        sync(folder)
    return [block.file for block in blocks if block.file is not None]


def _drop_blocks(folder: Path) -> None:
    """Remove blocks that no checkpoint refers to; none, if what one of them refers to cannot be read now."""
    kept = set[str]()
    with suppress(OSError):
        for path in checkpoints(folder):
            with suppress(FileNotFoundError):  # a checkpoint without its sums is none
                lines = os.fsdecode((path / SUMS_FILE).read_bytes()).splitlines()
                kept |= {line.rpartition("/")[2] for line in lines}
        for name in _names(folder / ROWS) - kept:
            (folder / ROWS / name).unlink()


def _names(folder: Path) -> set[str]:
    """What lies in a folder, if there is one: as text, for there may be a hundred thousand."""
    return set(os.listdir(folder)) if folder.exists() else set()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, sound or not, oldest first."""
    return sorted((p for p in folder.glob("round-*") if p.name[6:].isdigit()), key=_round)


@dataclass(frozen=True)
class Saved:
    """A checkpoint whose files are what was written."""

    path: Path
    entries: dict[str, Any]
    aside: Packed

    def take(self, key: str, classes: Mapping[str, type] | None = None, device: str | torch.device = "cpu") -> Any:
        """One entry on a device, its dataclasses made from those given by name.

        Raises:
            Damaged: if it does not hold the entry, or a dataclass of it has other fields by now.
        """
        try:
            return unpack(self.entries[key], self.aside, classes or {}, device)
        except Exception as e:
            raise _unreadable(self.path, e) from e


def load(path: Path) -> Saved:
    """What `save` wrote.

    Raises:
        Damaged: if a file is not what was written.
    """
    try:
        sums, own = (path / SUMS_FILE).read_bytes(), _sums(path, FILES)
        whole = sums.startswith(own)
        state = json.loads((path / "state.json").read_text(encoding="utf-8")) if whole else {}
        if not whole or sums != own + _sums(path, _paths(state["blocks"]).values()):
            raise ValueError(f"its files do not match {SUMS_FILE}")
        files = [path.parent / ROWS / name for name in state["blocks"]]
        blocks = [Block(partial(_load_block, file), file.name) for file in files]
        return Saved(path, dict(state["entries"]["$map"]), Packed(load_file(path / "tensors.safetensors"), blocks))
    except Exception as e:
        raise _unreadable(path, e) from e


def _load_block(file: Path) -> Tensor:
    return load_file(file)[ROWS]


def _paths(names: Sequence[str]) -> dict[str, str]:
    """{name: path} of blocks as seen from a checkpoint's folder; several may have one content, and so one file."""
    return {name: f"../{ROWS}/{name}" for name in names}


def _sums(path: Path, names: Iterable[str]) -> bytes:
    """Lines of `sha256sum`."""
    lines = []
    for name in names:
        with (path / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines).encode()


def _sums_of_blocks(names: Sequence[str]) -> bytes:
    """The same of blocks, whose names are their sums: what lies there from before is not read again."""
    return "".join(f"{name.removesuffix(SUFFIX)}  {path}\n" for name, path in _paths(names).items()).encode()


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


def check_same(path: Path, config: Mapping[str, Any], there: Mapping[str, str]) -> None:
    """Refuse to go on with what another config began.

    Args:
        path: what it left, for the message.
        config: today's, resolved.
        there: the fingerprint of the other.

    Raises:
        ConfigError: naming the sections that differ, or data or a model that do, with what they are and were.
    """
    here = fingerprint(config)
    changed = sorted(k for k in {*here, *there} if here.get(k) != there.get(k))
    if not changed:
        return
    sections = [k for k in changed if not k.startswith(IDENTITY)]
    if not sections:
        now, before = (
            "; ".join(f"{k.removeprefix(IDENTITY)}: {each.get(k)}" for k in changed) for each in (here, there)
        )
        raise ConfigError(
            f"{path}: the run began with other data or another model ({before}) than these ({now}); resume with the "
            "same, or start anew in another folder"
        )
    verb = "differs" if len(sections) == 1 else "differ"
    chosen = " ".join(f"{k}={json.loads(there[k])}" for k in sections if k.startswith("runtime.") and k in there)
    same = f"overrides (where `auto` chose: {chosen})" if chosen else "overrides"
    raise ConfigError(
        f"{path}: belongs to another config ({', '.join(sections)} {verb}); resume with the same file and {same}, "
        "or start anew in another folder"
    )


FREE_TO_CHANGE = ("rounds", "stop", "log", "checkpoint", "versions", "allow_divergence")
"""Sections that may differ on resume: they change how long a run is or what is kept of it, not its numbers."""


IDENTITY = "identity."


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """One text per section, to compare the config of an earlier run, as it was or read from its file, with today's."""
    out = {
        k: json.dumps(v, default=str, sort_keys=True)
        for k, v in config.items()
        if k not in (*FREE_TO_CHANGE, "runtime", "identity")
    }
    runtime = config.get("runtime", {})
    bits = ("engine", "stack", "stacks", "native", "graphs", "precision", "threads", "device")
    out |= {f"runtime.{k}": json.dumps(runtime[k]) for k in bits if k in runtime}
    return out | {f"{IDENTITY}{k}": v for k, v in config.get("identity", {}).items()}
