"""Checkpoints: what goes in comes out, whole or not at all."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsim import checkpoint
from fedsim.checkpoint import Block, Damaged, Packed, checkpoints, classes_of, load, misfit, pack, save, unpack
from fedsim.config import ConfigError
from tests.fedsim.console import contents


@dataclass(frozen=True)
class Inner:
    row: Tensor
    count: int = 0


@dataclass(frozen=True)
class Outer:
    x: Tensor
    parts: dict[int, Inner] = field(default_factory=dict)
    later: Inner | None = None
    derived: int = field(default=7, init=False)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal with equal types; NaN equals NaN, and -0.0 is not 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(TREES)
def test_plain_trees_come_back_through_json(tree: Any) -> None:
    packed = json.loads(json.dumps(pack(tree, Packed()), allow_nan=False))
    assert same(unpack(packed, Packed(), {}), tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_with_bits_type_and_shape(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(12).reshape(3, 4).to(dtype)
    state = {"whole": values, "column": values[:, 1], "none": values[:0], "number": values[0, 0]}
    save(tmp_path, 1, {"tensors": state})
    back = load(tmp_path / "round-000001").take("tensors")
    for name, value in state.items():
        assert back[name].dtype == dtype and back[name].shape == value.shape and torch.equal(back[name], value)


def test_not_a_number_and_infinity_keep_their_bits(tmp_path: Path) -> None:
    odd = [math.nan, math.inf, -math.inf, -0.0, 0.1 + 0.2, 5e-324]
    save(tmp_path, 1, {"numbers": odd, "tensor": torch.tensor(odd, dtype=torch.float64)})
    back = load(tmp_path / "round-000001")
    assert [v.hex() for v in back.take("numbers")] == [v.hex() for v in odd]
    assert [v.hex() for v in back.take("tensor").tolist()] == [v.hex() for v in odd]


def test_dataclasses_come_back_though_the_first_state_did_not_hold_them(tmp_path: Path) -> None:
    # `later` was None and `parts` empty when the run began; their classes are known from the type hints
    classes = classes_of(Outer(torch.zeros(2)))
    assert classes == {"Outer": Outer, "Inner": Inner}
    state = Outer(torch.ones(2), {3: Inner(torch.arange(3.0), 5)}, Inner(torch.zeros(1)))
    save(tmp_path, 12, {"strategy": state, "round": 12})
    back = load(tmp_path / "round-000012")
    made = back.take("strategy", classes)
    assert isinstance(made, Outer) and made.parts[3].count == 5 and made.derived == 7 and back.take("round") == 12
    assert torch.equal(made.parts[3].row, torch.arange(3.0)) and isinstance(made.later, Inner)


def test_what_comes_back_is_nobody_elses_memory(tmp_path: Path) -> None:
    x = torch.zeros(3)
    saved = load(save(tmp_path, 1, {"all": {"x": x, "view": x[1:], "same": x}}))
    x += 1
    first, second = (saved.take("all") for _ in range(2))
    assert first["x"].sum() == 0
    first["x"] += 5
    assert second["x"].sum() == 0 and first["view"].sum() == first["same"].sum() == 0


def test_what_cannot_be_saved_is_named_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, {"a": 1})
    before = contents(tmp_path)
    with pytest.raises(
        ConfigError, match=r"round-000002: a checkpoint can't hold a set \(at \.strategy\.x\); use tens"
    ):
        save(tmp_path, 2, {"strategy": {"x": {1, 2}}})
    assert contents(tmp_path) == before


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for k in (5, 10, 999_999, 1_000_000):
        save(tmp_path, k, {"k": k})
    assert [p.name for p in checkpoints(tmp_path)] == ["round-999999", "round-1000000"]
    assert load(checkpoints(tmp_path)[-1]).take("k") == 1_000_000


def test_later_checkpoints_go_when_a_run_went_on_from_an_earlier_one(tmp_path: Path) -> None:
    for k in (5, 10, 20, 12):
        save(tmp_path, k, {"k": k})
    assert [p.name for p in checkpoints(tmp_path)] == ["round-000010", "round-000012"]


@pytest.mark.parametrize("step", ["save_file", "sync", "os.replace"])
def test_a_failure_at_any_step_leaves_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, {"x": torch.zeros(2)})
    before = contents(tmp_path)

    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    owner, _, name = step.rpartition(".")
    monkeypatch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, fail)
    with pytest.raises(ConfigError, match=r"round-000002: can't write the checkpoint: .*No space left.*--resume"):
        save(tmp_path, 2, {"x": torch.ones(2)})
    assert contents(tmp_path) == before and not list(tmp_path.glob(".part-*"))


def test_half_a_checkpoint_is_none_and_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".part-000002").mkdir()  # by a run that was killed
    assert checkpoints(tmp_path) == checkpoints(tmp_path / "nowhere") == []
    save(tmp_path, 1, {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]


STATE = {"strategy": Inner(torch.arange(8.0), 3), "config": {"a": "1"}}


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_damage_is_named(file: str, damage: str, tmp_path: Path) -> None:
    path = save(tmp_path, 4, STATE)
    whole = (path / file).read_bytes()
    if damage == "gone":
        (path / file).unlink()
    else:
        (path / file).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\xff" * len(whole))
    with pytest.raises(Damaged, match=r"^round-000004: can't be read \("):
        load(path)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "SHA256SUMS"])
def test_one_flipped_bit_anywhere_is_noticed(file: str, tmp_path: Path) -> None:
    path = save(tmp_path, 4, STATE)
    whole = (path / file).read_bytes()
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        (path / file).write_bytes(flipped)
        with pytest.raises(Damaged, match="do not match SHA256SUMS"):
            load(path)
    (path / file).write_bytes(whole)
    assert load(path).take("config") == {"a": "1"}


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = save(tmp_path, 1, STATE)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True)
    assert done.stdout == "state.json: OK\ntensors.safetensors: OK\n"


def test_an_unknown_class_never_comes_out_but_plain_entries_do(tmp_path: Path) -> None:
    saved = load(save(tmp_path, 1, STATE))
    assert saved.take("config") == {"a": "1"}
    for key, trouble in (("strategy", "KeyError: 'Inner'"), ("nothing", "KeyError: 'nothing'")):
        with pytest.raises(Damaged, match=f"round-000001: can't be read .{trouble}"):
            saved.take(key)


@pytest.mark.parametrize(
    ("saved", "wrong"),
    [
        (Outer(torch.ones(3), {1: Inner(torch.zeros(1))}), None),
        (Outer(torch.ones(3), {}, Inner(torch.zeros(9))), None),  # began as None
        (Outer(torch.ones(4)), r"state.x is [4] torch.float32 where the run has [3] torch.float32"),
        (Outer(torch.ones(1, 3)), r"state.x is [1, 3] torch.float32 where"),
        (Outer(torch.ones(3, dtype=torch.float64)), r"state.x is [3] torch.float64 where"),
        (Inner(torch.ones(3)), "state is a Inner where the run has a Outer"),
    ],
)
def test_a_state_of_another_kind_is_told_apart(saved: Any, wrong: str | None) -> None:
    found = misfit(saved, Outer(torch.zeros(3)), sizes=(3,))
    assert found == wrong or (wrong and found and found.startswith(wrong))


def test_vectors_of_the_models_size_are_compared_by_name_and_others_may_change() -> None:
    fresh = {
        "m": torch.zeros(1, 3),
        "ids": torch.zeros(3, dtype=torch.int64),
        "few": torch.zeros(2),
        "v": [torch.ones(3)],
    }
    assert misfit({**fresh, "ids": torch.zeros(1), "few": torch.zeros(5), "more": 1}, fresh, (3,)) is None
    assert misfit({k: v for k, v in fresh.items() if k != "m"}, fresh, (3,)) == "state.m is missing"
    assert str(misfit({**fresh, "m": torch.zeros(1, 2)}, fresh, (3,))).startswith("state.m is [1, 2]")
    assert str(misfit({**fresh, "v": [torch.ones(2)]}, fresh, (3,))).startswith("state.v.0 is [2]")


def test_what_was_on_the_host_comes_back_to_the_host_whatever_the_device() -> None:
    tree = {"a": [torch.zeros(2), 3], "b": Outer(torch.zeros(1), {1: Inner(torch.zeros(1))}), "c": (None, "x")}
    aside = Packed()
    found = unpack(pack(tree, aside), aside, classes_of(tree), torch.device("meta"))
    assert found["a"][0].device.type == found["b"].x.device.type == found["b"].parts[1].row.device.type == "cpu"
    assert found["a"][1] == 3 and found["c"] == (None, "x")


# Rows in blocks ---------------------------------------------------------------------------------------------------


def blocks_of(*values: float) -> list[Block]:
    """Blocks of two rows each."""
    return [Block(partial(torch.full, (2, 3), float(value))) for value in values]


def files(folder: Path) -> set[str]:
    return {p.name for p in (folder / "rows").iterdir()}


def values(path: Path) -> list[float]:
    return [float(block.rows().mean()) for block in load(path).take("memory")]


def test_a_block_is_written_once_for_as_long_as_its_rows_stay_as_they_are(tmp_path: Path) -> None:
    blocks = blocks_of(1, 2, 3)
    first = save(tmp_path, 1, {"memory": blocks})
    before = {name: (tmp_path / "rows" / name).stat().st_mtime_ns for name in files(tmp_path)}
    blocks[1].rows, blocks[1].file = partial(torch.full, (2, 3), 7.0), None
    second = save(tmp_path, 2, {"memory": blocks})
    assert len(files(tmp_path)) == 4 and set(before) < files(tmp_path)
    assert all((tmp_path / "rows" / name).stat().st_mtime_ns == t for name, t in before.items())
    assert values(first) == [1, 2, 3] and values(second) == [1, 7, 3]
    save(tmp_path, 3, {"memory": blocks})  # now nothing refers to the 2 any more
    assert len(files(tmp_path)) == 3 and values(second) == [1, 7, 3]
    save(tmp_path, 4, {"memory": []})
    save(tmp_path, 5, {"memory": []})
    assert files(tmp_path) == set()


def test_blocks_that_were_loaded_are_not_written_again(tmp_path: Path) -> None:
    blocks = load(save(tmp_path, 1, {"memory": blocks_of(1, 2)})).take("memory")
    times = {p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()}
    assert values(save(tmp_path, 2, {"memory": blocks})) == [1, 2]
    assert {p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()} == times
    there = tmp_path / "another"
    assert values(save(there, 1, {"memory": blocks})) == [1, 2]  # of another run, which may outlive the first
    assert files(there) == files(tmp_path)


def test_sums_hold_every_block_and_damage_is_noticed_by_those_that_hold_it(tmp_path: Path) -> None:
    blocks = blocks_of(1, 2)
    first = save(tmp_path, 1, {"memory": blocks})
    blocks[1].rows, blocks[1].file = partial(torch.full, (2, 3), 7.0), None
    second = save(tmp_path, 2, {"memory": blocks})
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=second, capture_output=True, text=True)
    assert done.stdout.count(": OK") == 4 and done.stdout.count("../rows/") == 2
    assert blocks[1].file is not None
    file = tmp_path / "rows" / blocks[1].file
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"\x01", None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"^round-000002: can't be read"):
            load(second)
        assert values(first) == [1, 2]
    save(tmp_path, 3, {"memory": blocks})  # which finds that the file is gone
    assert values(second) == [1, 7] and file.read_bytes() == whole


@pytest.mark.parametrize("step", ["save_file", "sync", "os.replace"])
def test_a_failure_leaves_the_blocks_of_earlier_checkpoints(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(1, 2)
    first = save(tmp_path, 1, {"memory": blocks})
    before = contents(tmp_path)
    blocks[1].rows, blocks[1].file = partial(torch.full, (2, 3), 7.0), None

    def fail(*args: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    owner, _, name = step.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, fail)
        with pytest.raises(ConfigError, match="round-000002: can't write the checkpoint: .*No space left"):
            save(tmp_path, 2, {"memory": blocks})
    assert contents(tmp_path) == before
    assert values(save(tmp_path, 2, {"memory": blocks})) == [1, 7] and values(first) == [1, 2]


def test_a_checkpoint_that_cannot_be_read_just_now_keeps_its_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = blocks_of(1, 2)
    first = save(tmp_path, 1, {"memory": blocks})
    blocks[1].rows, blocks[1].file = partial(torch.full, (2, 3), 7.0), None

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        second = save(tmp_path, 2, {"memory": blocks})
    assert values(first) == [1, 2] and values(second) == [1, 7]
