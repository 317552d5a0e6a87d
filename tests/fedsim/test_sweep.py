"""Sweeps: the grid, its folders, and going on with what was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsim import runs
from fedsim.config import ConfigError
from fedsim.sweep import grid, sweep
from tests.fedsim.console import contents, fedsim

QUAD = """\
rounds: 6
task: {name: quadratic, dim: 3}
clients: {count: 5}
strategy: {name: fedavg}
local: {steps: 4, optimizer: {name: sgd, lr: 0.1}}
evaluate: {every: 2}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "quad.yaml").write_text(QUAD)
    monkeypatch.chdir(tmp_path)
    return Path("quad.yaml")


def test_a_grid_is_the_product_of_its_lists_with_the_rest_fixed() -> None:
    points = grid({"rounds": 3, "seed": [0, 1], "task.model.hidden": [[10], [20, 30]]})
    assert [p.name for p in points] == [
        "seed=0,hidden=10",
        "seed=0,hidden=20-30",
        "seed=1,hidden=10",
        "seed=1,hidden=20-30",
    ]
    assert points[1].overrides == {"rounds": 3, "seed": 0, "task.model.hidden": [20, 30]}


def test_folders_are_named_by_what_tells_them_apart() -> None:
    assert grid({"local.optimizer.lr": [0.1], "strategy.optimizer.lr": [1]})[0].name == (
        "local.optimizer.lr=0.1,strategy.optimizer.lr=1"
    )
    entries = [{"name": "iid"}, {"name": "dirichlet", "alpha": 0.1}]
    assert [p.name for p in grid({"partition": entries})] == ["partition=iid", "partition=dirichlet"]
    assert [p.name for p in grid({"data.root": ["/a/b", None]})] == ["root=a-b", "root=None"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seed": 1}, "no axis; give key="),
        ({"seed": []}, "seed has no values"),
        ({"seed": [1, 1]}, "two runs of the grid are the same"),
    ],
)
def test_what_is_no_grid_is_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(overrides)


def test_every_run_has_a_folder_and_all_are_compared(config: Path) -> None:
    found = fedsim("sweep", config, "local.optimizer.lr=[0.05,0.1]", "seed=[0,1]", "rounds=4", "--out", "grid")
    assert found.code == 0 and found.err == ""
    folders = [f"lr={lr},seed={seed}" for lr in (0.05, 0.1) for seed in (0, 1)]
    for name in folders:
        assert f"grid/{name}: done\n" in found.out
        assert json.loads((Path("grid") / name / "summary.json").read_text())["rounds"] == 4
    assert Path("grid/comparison.html").exists() and "local.optimizer.lr=0.05" in found.out


def test_a_run_of_a_grid_is_the_run_of_its_overrides(config: Path) -> None:
    list(sweep(config, {"local.optimizer.lr": [0.05]}, Path("grid")))
    assert fedsim("run", config, "local.optimizer.lr=0.05", "--out", "alone", "-q").code == 0
    model = "model.safetensors"
    assert (Path("grid/lr=0.05") / model).read_bytes() == (Path("alone") / model).read_bytes()


def test_a_grid_that_was_stopped_is_completed(config: Path) -> None:
    first = sweep(config, {"seed": [0, 1, 2]}, Path("grid"))
    next(first)
    first.close()
    before = contents(Path("grid/seed=0"))
    raw, source = runs.load(config, {"seed": 1, "rounds": 3})  # the second was stopped in mid-run
    runs.execute(raw, source, Path("grid/seed=1"))
    (Path("grid/seed=1") / "summary.json").unlink()
    ended = [how for _, how in sweep(config, {"seed": [0, 1, 2]}, Path("grid"))]
    assert ended == ["done before", "done", "done"] and contents(Path("grid/seed=0")) == before
    assert len((Path("grid/seed=1") / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_mistake_anywhere_in_the_grid_stops_it_before_it_starts(config: Path) -> None:
    found = fedsim("sweep", config, "strategy.server_lr=[1.0,fast]")
    assert found.code == 2 and "strategy.server_lr: expected a number, got 'fast'" in found.err
    assert not Path("runs").exists()


def test_another_grid_does_not_mix_into_a_folder(config: Path) -> None:
    list(sweep(config, {"seed": [0]}, Path("grid")))
    with pytest.raises(ConfigError, match="grid/seed=0 holds a run of another sweep; give another --out"):
        list(sweep(config, {"seed": [0], "rounds": 9}, Path("grid")))


def test_a_run_that_diverges_does_not_stop_the_others(config: Path) -> None:
    found = fedsim("sweep", config, "local.optimizer.lr=[1e30,0.1]", "--out", "grid")
    assert found.code == 1 and "fedsim: 1 of 2 runs diverged" in found.err
    assert "not finite, the run diverged" in found.out and "grid/lr=0.1: done" in found.out
