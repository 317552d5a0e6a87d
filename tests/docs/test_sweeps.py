"""The guide to sweeps runs as it stands."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedsim.history import History
from tests.docs.blocks import blocks, play

GUIDE = Path(__file__).parents[2] / "docs" / "sweeps.md"


@pytest.mark.slow
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # one trial at a time, in this process
    names = play(blocks(GUIDE), tmp_path, "docs/sweeps.md")
    lines = {
        folder: [json.loads(line) for line in (tmp_path / "runs" / folder / "sweep.jsonl").read_text().splitlines()]
        for folder in ("digits-sweep", "random", "tpe", "methods", "python")
    }
    assert {folder: len(found) for folder, found in lines.items()} == {
        "digits-sweep": 4,
        "random": 3,
        "tpe": 4,
        "methods": 6,
        "python": 2,
    }
    best = max(line["test_accuracy"] for line in lines["methods"] if line["method"] == "fedavg_m")
    assert History.load("runs/best").last("test_accuracy") == best == names["table"]["test_accuracy"][2:].max()
    assert names["results"].best[""].value == max(line["test_accuracy"] for line in lines["python"])
