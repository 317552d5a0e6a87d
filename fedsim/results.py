"""What a run leaves in its folder: config.yaml (resolved, with versions), env.json, metrics.jsonl, summary.json,
model.safetensors, model.best.safetensors, clients.jsonl, timeline.jsonl, split.npz, topology.npz (of peers),
checkpoints/ and report.html.
"""

from __future__ import annotations

import io
import json
import platform
import warnings
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.best import Best, best_row
from fedsim.compose import Composition
from fedsim.files import write_tensors, write_whole
from fedsim.fleet import DrivenFleet
from fedsim.history import BEST_FILE, MODEL_FILE, History
from fedsim.loop import Experiment
from fedsim.params import Layout
from fedsim.sinks import encode_row
from fedsim.strategies.peers import Peers
from fedsim.topology import overview

PACKAGES = ("torch", "numpy", "ray", "flwr", "safetensors")
MAX_CLIENTS_LISTED = 100_000


def write_inputs(folder: Path, composition: Composition) -> None:
    """What is known before the first round; a resume adds what is missing, and what it may change of the config."""
    write_config(folder / "config.yaml", {**composition.resolved, "versions": versions()})
    if not (folder / "env.json").exists():
        _write_environment(folder, composition.experiment.device)
    if not (folder / "split.npz").exists():
        _write_split(folder, composition)
    if isinstance(composition.experiment.strategy, Peers):
        _write_topology(folder, composition.experiment, composition.experiment.strategy)


def write_config(path: Path, resolved: Mapping[str, Any]) -> None:
    """The resolved configuration as YAML; running it again gives the same metrics."""
    from omegaconf import OmegaConf

    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    out = {"fedsim": _version("fedsim-stacks"), "python": platform.python_version()}
    return out | {name: _version(name) for name in PACKAGES}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _write_environment(folder: Path, device: torch.device) -> None:
    info = {
        **versions(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    write_whole(folder / "env.json", json.dumps(info, indent=2) + "\n")


def _write_split(folder: Path, composition: Composition) -> None:
    """Which client has how many samples of each class, for the report's picture."""
    data = composition.data
    if data is None or not data.has_classes or data.num_clients > MAX_CLIENTS_LISTED or data.num_classes > 1000:
        return
    names = [str(k) for k in range(data.num_classes)] if data.class_names is None else list(data.class_names)
    content = io.BytesIO()
    np.savez_compressed(content, counts=data.class_counts().cpu().numpy(), class_names=np.array(names))
    write_whole(folder / "split.npz", content.getvalue())


def _write_topology(folder: Path, experiment: Experiment, strategy: Peers) -> None:
    """The graph of the first step, and how fast peers agree, for the report's picture."""
    n, content = len(experiment.fleet.clients), io.BytesIO()
    graphs, gap = overview(strategy.topology, n, experiment.seed)
    pairs = torch.stack([graphs[0].hearers, graphs[0].peers])[:, ~graphs[0].is_own]
    np.savez_compressed(content, n=n, pairs=pairs.numpy(), gap=np.nan if gap is None else gap, steps=len(graphs))
    write_whole(folder / "topology.npz", content.getvalue())


def write_results(folder: Path, composition: Composition, x: Tensor, history: History, why: str) -> None:
    """What is known after the last round; the summary comes last but for the report, and tells that all is there.

    Args:
        folder: of the run.
        composition: what ran.
        x: [P], the server's model.
        history: its rows.
        why: it ended.
    """
    experiment = composition.experiment
    _write_model(folder / MODEL_FILE, composition, x)
    _write_timeline(folder, experiment.fleet)
    if experiment.evaluate.per_client and composition.data is not None:
        _write_clients(folder, experiment, x)
    final = {key: history.last(key) for key in history.keys()}
    summary = {"rounds": history.rows[-1]["round"], "ended": why, "final": json.loads(encode_row(final))}
    if (best := best_row(history.rows, "test_accuracy")) is not None:
        summary["best_test_accuracy"] = best["test_accuracy"]
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    _write_report(folder)


def _write_report(folder: Path) -> None:
    from fedsim.report import write_report

    try:
        write_report(folder)
    except Exception as e:
        warnings.warn(
            f"{folder}: the run is complete, but not its report ({type(e).__name__}: {e}); `fedsim report {folder}` "
            "writes it again",
            stacklevel=2,
        )


def write_best(folder: Path, composition: Composition, best: Best) -> None:
    """The model of the round in which `checkpoint.best` was best so far."""
    _write_model(folder / BEST_FILE, composition, best.x, round=best.round, **{best.metric: best.value})


def _write_model(path: Path, composition: Composition, x: Tensor, **notes: Any) -> None:
    """A module's state dict, or a formula's own tensors, of x [P]; beside it what the module was made for."""
    if composition.module is not None:
        tensors = Layout.of_module(composition.module).state_dict(x.cpu(), composition.module)
    else:
        tensors = {k: v.contiguous() for k, v in composition.experiment.task.layout.views(x.cpu()).items()}
    write_tensors(path, tensors, {"fedsim": json.dumps({"sizes": composition.sizes, **notes})})


def _write_timeline(folder: Path, fleet: DrivenFleet) -> None:
    """Who worked when and which server step took the reply, for the first jobs of an asynchronous run."""
    if fleet.timeline:
        keys = ("client", "start", "finish", "round")
        lines = [json.dumps(dict(zip(keys, job, strict=True))) for job in fleet.timeline]
        write_whole(folder / "timeline.jsonl", "\n".join(lines) + "\n")


def _write_clients(folder: Path, experiment: Experiment, x: torch.Tensor) -> None:
    """How the final model does on every client's own data, and clients' own models on what they hold out."""
    task = experiment.task
    if len(task.num_examples) > MAX_CLIENTS_LISTED:
        return
    values = dict(task.evaluate_clients(x, experiment.pool))
    if task.holds_out:
        own = experiment.evaluate.own_scores(experiment.strategy, experiment.fleet, x)
        values |= {"held_out": own.pop("examples").long(), **own}
    counts = task.num_examples.tolist()
    columns = {k: v.tolist() for k, v in values.items()}
    lines = [
        encode_row({"client": i, "num_examples": n, **{k: v[i] for k, v in columns.items()}})
        for i, n in enumerate(counts)
        if n > 0
    ]
    write_whole(folder / "clients.jsonl", "\n".join(lines) + "\n")
