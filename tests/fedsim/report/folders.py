"""Run folders for the tests, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NASTY = "<script>alert(1)</script>"

CONFIG = """\
seed: {seed}
task: {{name: classification, dataset: digits, model: {{name: mlp, hidden: [200]}}}}
partition: {{name: dirichlet, alpha: 0.1}}
clients: {{count: 1200}}
strategy: {{name: {strategy}, cohort_size: 10}}
log: {{sinks: [jsonl]}}
versions: {{fedsim: 0.1.0, torch: 2.13.0}}
"""


def write_rows(folder: Path, rows: list[dict[str, Any]], config: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def curve(accuracies: list[float], *, seconds: float = 2.0, bits: float = 1e6, every: int = 1) -> list[dict[str, Any]]:
    """Rows of a run that evaluates every round, `seconds` and `bits` apart."""
    return [
        {
            "round": every * (i + 1),
            "virtual_seconds": seconds * (i + 1),
            "wall_seconds": 0.1 * (i + 1),
            "bits_up": bits * (i + 1),
            "bits_down": bits * (i + 1),
            "train_loss": 1 / (i + 1),
            "test_loss": 2 / (i + 1),
            "test_accuracy": accuracy,
        }
        for i, accuracy in enumerate(accuracies)
    ]


def full(folder: Path, *, name: str = "fedbuff") -> Path:
    """A run that has everything a report can show."""
    rows = curve([0.1 + 0.02 * i for i in range(40)])
    for row in rows:
        row |= {"client_accuracy_mean": 0.5, "client_accuracy_std": 0.1, "client_accuracy_worst_decile": 0.3}
        row |= {"client_loss_mean": 1.0, "client_loss_std": 0.2, "client_loss_worst_decile": 1.5}
        row |= {"staleness_mean": 1.5, "honest_spread": 1 / row["round"], "distance": 0.5}
        row |= {"x": [1.0, 1 / row["round"]]}
    write_rows(folder, rows, CONFIG.format(seed=0, strategy=name))
    counts = np.arange(50).reshape(10, 5) % 7
    np.savez(folder / "split.npz", counts=counts, class_names=np.array(["a", "b", "$x_", NASTY, "&amp;"]))
    clients = [{"client": i, "num_examples": 5, "accuracy": i / 10, "loss": 1.0} for i in range(10)]
    (folder / "clients.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clients))
    jobs = [{"client": i % 5, "start": float(i), "finish": i + 4.5, "round": i} for i in range(60)]
    (folder / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in jobs))
    (folder / "env.json").write_text(json.dumps({"cpu": "two cores", "note": NASTY}))
    return folder
