"""A run's folder after bad luck: a resume gives the bits of a run that nothing happened to, or one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from numpy.random import Generator, default_rng

import fedsim
from fedsim.files import write_whole
from tests.build import rows_in
from tests.fedsim.console import fedsim as console
from tests.fuzz.amount import cases

CONFIG: dict[str, Any] = {
    "rounds": 6,
    "task": {"name": "quadratic", "dim": 6, "noise": 0.1},
    "clients": {"count": 5},
    "strategy": {"name": "scaffold", "cohort_size": 3},
    "local": {"steps": 2, "optimizer": {"name": "sgd", "lr": 0.1}},
    "evaluate": {"every": 3},
    "checkpoint": {"every": 2},
    "log": {"sinks": ["jsonl"]},
}


@pytest.fixture(autouse=True)
def _plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing pictures is most of so short a run."""
    monkeypatch.setattr("fedsim.report.write_report", lambda folder: write_whole(folder / "report.html", "drawn"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(the config, a run of six rounds, one of nine that was never touched)."""
    root = tmp_path_factory.mktemp("checkpoints")
    (root / "fuzz.yaml").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.report.write_report", lambda folder: write_whole(folder / "report.html", "drawn"))
        fedsim.run(CONFIG, out=root / "six")
        fedsim.run(CONFIG, out=root / "nine", rounds=9)
    return root / "fuzz.yaml", root / "six", root / "nine"


def damage(folder: Path, rng: Generator) -> str:
    """Do something to one file of a folder; what it was."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    path = files[rng.integers(len(files))]
    content, kind = bytearray(path.read_bytes()), int(rng.integers(9))
    at = int(rng.integers(len(content))) if content else 0
    if kind == 0 and content:
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        content = content[:at]
    elif kind == 2:
        content[at : at + 16] = rng.bytes(16)
    elif kind == 3:
        content += rng.bytes(20)
    elif kind == 4:
        content = bytearray(rng.choice([b"", b"{}", b"[" * 5000, b"null", b"\xff" * 9, b'{"entries": {"$map": 3}}']))
    path.write_bytes(content)
    if kind == 5:
        path.unlink()
    elif kind == 6:
        path.unlink()
        path.mkdir()
    elif kind == 7:
        left = [path.with_name(path.name + ".part"), folder / "checkpoints" / ".part-000007" / path.name]
        for part in left:
            part.parent.mkdir(exist_ok=True)
            part.write_bytes(rng.bytes(50))
    elif kind == 8:
        shutil.rmtree(path.parent) if path.parent != folder else path.unlink()
    return f"{path.relative_to(folder)}, kind {kind}, at {at}"


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("default")  # that a damaged checkpoint is passed over
def test_a_resume_from_a_damaged_folder_gives_the_bits_of_a_sound_one_or_one_message(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    config, six, nine = folders
    rng, whole = default_rng(11), (rows_in(nine), (nine / "model.safetensors").read_bytes())
    codes = []
    for case in range(cases(10, 1000)):
        folder = tmp_path / str(case)
        shutil.copytree(six, folder)
        done = "; ".join(damage(folder, rng) for _ in range(rng.integers(1, 3)))
        found = console("run", config, "rounds=9", "--out", folder, "--resume", "-q")
        codes.append(found.code)
        if found.code == 0:
            assert (rows_in(folder), (folder / "model.safetensors").read_bytes()) == whole, done
            assert not list(folder.rglob("*.part*")), done
        else:
            *warned, said = found.err.splitlines()
            assert found.code == 2 and said.startswith("fedsim: ") and len(warned) <= 1, (done, found)
        shutil.rmtree(folder)
    assert 0 in codes
