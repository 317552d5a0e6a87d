"""A fault at any file call of a run costs no result: it ends with one message, and resumes to the same bits."""

from __future__ import annotations

import builtins
import errno
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim import checkpoint, results
from fedsim.files import LOCK_FILE
from tests.build import rows_in
from tests.fedsim.test_runs import model

CONFIG: dict[str, Any] = {
    "rounds": 5,
    "task": {
        "name": "classification",
        "dataset": {"name": "blobs", "num_examples": 40, "shape": [3], "num_classes": 2},
        "model": "logistic",
    },
    "clients": {"count": 4},
    "strategy": {"name": "scaffold", "cohort_size": 2},
    "local": {"steps": 1, "batch_size": 4, "optimizer": {"name": "sgd", "lr": 0.1}},
    "evaluate": {"every": 2},
    "checkpoint": {"every": 2},
    "runtime": {"memory": "disk", "workers": 1},
}
PARTS = ("config.yaml", "env.json", "split.npz", "summary.json", "clients.jsonl", "report.html")


class Killed(BaseException):
    """The process is gone: nothing catches this."""


class Faults:
    """Counts calls that touch files below a folder, and fails in one of them.

    Args:
        root: the folder.
        at: the call that fails, from 1.
        how: once, then the disk has room again; for good; or killed, so that nothing after it happens either.
    """

    def __init__(self, root: Path, at: int, how: str) -> None:
        self.root, self.at, self.how, self.count = str(root), at, how, 0

    def touch(self) -> None:
        self.count += 1
        if self.count == self.at or (self.count > self.at and self.how != "once"):
            raise Killed if self.how == "killed" else OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self) -> Faults:
        self.patch = pytest.MonkeyPatch()
        for name in ("open", "mkdir", "replace", "unlink", "rmdir"):
            self.patch.setattr(os, name, self.by_path(getattr(os, name)))
        for name in ("fsync", "ftruncate", "write", "pwrite"):
            self.patch.setattr(os, name, self.always(getattr(os, name)))
        self.patch.setattr(checkpoint, "save_file", self.always(checkpoint.save_file))
        for module in (builtins, io):
            self.patch.setattr(module, "open", self.opener(builtins.open))
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.undo()

    def always(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **more: Any) -> Any:
            self.touch()
            return call(*args, **more)

        return inner

    def by_path(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(path: Any, *args: Any, **more: Any) -> Any:
            if str(path).startswith(self.root):
                self.touch()
            return call(path, *args, **more)

        return inner

    def opener(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(path: Any, *args: Any, **more: Any) -> Any:
            if not str(path).startswith(self.root):
                return call(path, *args, **more)
            self.touch()
            return File(call(path, *args, **more), self)

        return inner


class File:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, text: Any) -> Any:
        self.faults.touch()
        return self.file.write(text)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __iter__(self) -> Any:
        return iter(self.file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "whole"
    fedsim.run(CONFIG, out=folder)
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk, and on a clock that stands, so that equal folders are equal."""
    monkeypatch.setattr(os, "fsync", lambda number: None)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)


def tree(folder: Path) -> frozenset[tuple[Path, object]]:
    """All that a resume can see of a folder: paths, and what the files hold; the lock's text only informs."""
    paths = (p for p in (folder, *folder.rglob("*")) if p.name != LOCK_FILE)
    return frozenset((p.relative_to(folder), p.read_bytes() if p.is_file() else p.exists()) for p in paths)


@pytest.mark.parametrize("how", ["once", "for good", "killed"])
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*the run is complete, but not its report:UserWarning")
@pytest.mark.filterwarnings("ignore:.*can't be locked:UserWarning")
def test_a_fault_at_any_file_call_is_one_message_and_resumes_to_the_same_bits(
    how: str, whole: Path, tmp_path: Path
) -> None:
    expected, final, seen = rows_in(whole), model(whole), set[Any]()
    # each call fails in one of the three ways: for the suite's time
    for at in range({"for good": 1, "once": 2, "killed": 3}[how], 1000, 3):
        folder = tmp_path / f"{at:03d}"
        with Faults(folder, at, how) as faults:
            try:
                fedsim.run(CONFIG, out=folder)
            except ValueError as e:  # what the command line shows as one message, with exit 2
                assert "No space left" in str(e) and "\n" not in str(e), at
            except Killed:
                assert how == "killed"
        if faults.count < at:
            break
        if (left := tree(folder)) in seen:
            continue  # gone on from already
        seen.add(left)
        fedsim.run(CONFIG, out=folder, resume=results.holds_run(folder))
        assert rows_in(folder) == expected and model(folder) == final, at
        assert not {*PARTS} - {p.name for p in folder.iterdir()}, at
        assert not list(folder.rglob(".part*")), at
    assert at > 50 and len(seen) > 5
