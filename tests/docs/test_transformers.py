"""The guide to large models runs as it stands, but for what needs packages that are no part of the project."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedsim.history import History
from tests.docs.blocks import blocks, play

GUIDE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    play(blocks(GUIDE), tmp_path, "docs/transformers.md")
    head, adapters = 64 * 10 + 10, 4 * 64 + 64 * 4
    for name, size in (("head", head), ("lora", head + adapters)):
        assert History.load(f"runs/{name}").last("bits_up") == 2 * 5 * 32 * size
    assert load_file("runs/lora/model.safetensors").keys() - load_file("runs/head/model.safetensors").keys() == {
        "1.lora_a",
        "1.lora_b",
    }
