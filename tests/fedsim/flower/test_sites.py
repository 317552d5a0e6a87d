from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import apps, runs
from tests.fedsim.flower.local_grid import LocalGrid, VirtualClock

SITES = ["north", "south", "west"]
HERE = "tests.fedsim.flower.sites"


def write_samples(file: Path, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count)
    x = rng.normal(size=(count, 4)) + y[:, None]
    file.parent.mkdir()
    np.savez(file, x=x.astype(np.float32), y=y.astype(np.int64))


def experiment(root: Path, dataset: dict[str, Any]) -> dict[str, Any]:
    return {
        "rounds": 3,
        "task": {"name": "classification", "dataset": {**dataset, "sites": SITES}, "model": {"name": "logistic"}},
        "partition": "natural",
        "data": {"root": str(root)},
        "strategy": {"name": "fedavg"},
        "local": {"epochs": 1, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.1}},
        "evaluate": {"every": 1, "per_client": False},
        "runtime": {"stack": 1},
    }


def test_devices_that_hold_only_their_own_data_train_as_if_it_lay_in_one_place(tmp_path: Path) -> None:
    for k, site in enumerate(SITES):
        write_samples(tmp_path / site / f"{site}.npz", k, 20 + 11 * k)
    write_samples(tmp_path / "server" / "test.npz", 9, 30)

    raw = experiment(tmp_path / "server", {"name": f"{HERE}:load"})
    clock = VirtualClock()
    grid = LocalGrid(apps.client_app(raw), len(SITES), clock=clock)
    for site, context in zip(SITES, grid.contexts.values(), strict=True):
        context.node_config["fedsim-overrides"] = f"data.root={tmp_path / site} task.dataset.site={site}"
    got = apps.serve(grid, raw, {"fedsim-out": str(tmp_path / "run")}, clock).rows

    expected = runs.run(experiment(tmp_path, {"name": f"{HERE}:load_all"})).rows
    for row, other in zip(got, expected, strict=True):
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)  # weighted by the sites' own counts
    assert got[-1]["test_loss"] < got[0]["test_loss"]
