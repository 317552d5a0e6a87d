"""Run folders: what a run leaves behind, and running an experiment into one.

A folder holds config.yaml (resolved, with versions), env.json, metrics.jsonl, summary.json, model.safetensors,
clients.jsonl, split.npz, checkpoints/ and report.html.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedsim import checkpoint
from fedsim.compose import Composition, compose
from fedsim.config import ConfigError
from fedsim.fleet import DrivenFleet
from fedsim.history import History
from fedsim.loop import Watch, train
from fedsim.overrides import apply_overrides, read_file
from fedsim.params import Layout
from fedsim.sinks import METRICS_FILE, encode_row, write_whole
from fedsim.task import Task

PACKAGES = ("torch", "numpy", "ray", "flwr", "safetensors")
MAX_CLIENTS_LISTED = 100_000


def run(
    config: str | Path | Mapping[str, Any], *, out: str | Path | None = None, resume: bool = False, **overrides: Any
) -> History:
    """Run an experiment and return its history.

    Args:
        config: a file, or its content as nested mappings.
        out: folder to write to; None writes nothing.
        resume: go on from the newest checkpoint in `out`.
        overrides: top-level keys (`rounds=5`), or dotted ones as `**{"local.optimizer.lr": 0.1}`.

    Raises:
        ConfigError: for a mistake in the file or the data.
        fedsim.loop.Diverged: if the model is not finite any more.
    """
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise ConfigError("resume=True needs out=, the folder of the run to go on with")
    raw, source = load(config, overrides)
    return execute(raw, source, folder, resume=resume)


def load(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(content after overrides, name for messages) of a config given as a file or as mappings."""
    if isinstance(config, Mapping):
        return apply_overrides(config, overrides, "config"), "config"
    return apply_overrides(read_file(config), overrides, str(config)), str(config)


def execute(
    raw: Mapping[str, Any],
    source: str,
    folder: Path | None,
    *,
    resume: bool = False,
    watch: Watch = lambda row: None,
    started: Callable[[Composition], None] = lambda composition: None,
    fleet: Callable[[Composition], DrivenFleet] | None = None,
) -> History:
    """Compose and run; with a folder, leave everything a run leaves.

    Args:
        raw: the file's content after overrides.
        source: the file's name, for messages.
        folder: the run's folder, or None.
        resume: go on from the folder's newest checkpoint.
        watch: called with every row.
        started: called with the composition just before the first round.
        fleet: makes the fleet to run on from the composition, before anything is written; None keeps the simulated one.
    """
    if folder is not None:
        check_folder(folder, resume)
    composition = compose(raw, source, folder)
    try:
        if fleet is not None:
            composition.experiment.fleet = fleet(composition)
        if folder is not None:
            return _into(composition, folder, resume, watch, started)
        started(composition)
        state, rows, why = train(composition.experiment, watch=watch)
        return History(rows, dict(composition.resolved), None)
    finally:
        composition.close()


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        ConfigError: if the folder holds a run and this is no resume, or holds none and it is.
    """
    holds = (folder / METRICS_FILE).exists() or (folder / "config.yaml").exists()
    if holds and not resume:
        raise ConfigError(f"{folder} already holds a run; add --resume to go on with it or give another --out")
    if resume and not holds:
        raise ConfigError(f"{folder} holds no run to resume; leave out --resume to start one there")


def next_folder(config: str | Path, root: Path = Path("runs")) -> Path:
    """The first free `runs/<name of the config>-NNN`."""
    stem, k = Path(config).stem, 1
    while (root / f"{stem}-{k:03d}").exists():
        k += 1
    return root / f"{stem}-{k:03d}"


def last_folder(config: str | Path, root: Path = Path("runs")) -> Path:
    """The newest `runs/<name of the config>-NNN`, for --resume without --out.

    Raises:
        ConfigError: if there is none.
    """
    found = sorted(root.glob(f"{Path(config).stem}-[0-9][0-9][0-9]"))
    if not found:
        raise ConfigError(f"{root} holds no run of {config}; leave out --resume to start one, or give --out")
    return found[-1]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    out = {"fedsim": _version("fedsim-stacks"), "python": platform.python_version()}
    return out | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _into(
    composition: Composition, folder: Path, resume: bool, watch: Watch, started: Callable[[Composition], None]
) -> History:
    """Run into a folder."""
    experiment, resolved = composition.experiment, composition.resolved
    found = checkpoint.checkpoints(folder / "checkpoints") if resume else []
    resume_at = int(found[-1].name.removeprefix("round-")) if found else (0 if resume else None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            write_config(folder / "config.yaml", {**resolved, "versions": versions()})
            _write_environment(folder, experiment.device)
            _write_split(folder, composition)
        for sink in composition.sinks:
            sink.open(folder, resolved, resume_at)
    except OSError as e:
        raise ConfigError(f"{folder}: can't write here: {e}; make room or choose another --out") from e
    try:
        try:
            started(composition)
            state, _, why = train(experiment, sinks=composition.sinks, folder=folder, resume=bool(found), watch=watch)
        finally:
            for sink in composition.sinks:
                sink.close()
        history = History.load(folder)
        if resume:
            write_config(folder / "config.yaml", {**resolved, "versions": versions()})
        _write_results(folder, composition, state, history, why)
        from fedsim.report import write_report

        write_report(folder)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"{folder}: writing failed: {e}; make room, then add --resume to go on") from e
    return history


def write_config(path: Path, resolved: Mapping[str, Any]) -> None:
    """The resolved configuration as YAML; running it again gives the same metrics."""
    from omegaconf import OmegaConf

    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))


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
    if data is None or data.num_clients > MAX_CLIENTS_LISTED or data.num_classes > 1000:
        return
    names = [str(k) for k in range(data.num_classes)] if data.class_names is None else list(data.class_names)
    np.savez_compressed(folder / "split.npz", counts=data.class_counts().cpu().numpy(), class_names=np.array(names))


def _write_results(folder: Path, composition: Composition, state: Any, history: History, why: str) -> None:
    experiment = composition.experiment
    last = history.rows[-1]
    final = {key: history.last(key) for key in history.keys()}
    summary = {"rounds": last["round"], "ended": why, "final": json.loads(encode_row(final))}
    best = [row["test_accuracy"] for row in history.rows if row.get("test_accuracy") is not None]
    if best:
        summary["best_test_accuracy"] = max(best)
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    if composition.module is not None:
        tensors = Layout.of_module(composition.module).state_dict(state.x.cpu(), composition.module)
    else:
        tensors = {k: v.contiguous() for k, v in experiment.task.layout.views(state.x.cpu()).items()}
    save_file(tensors, folder / "model.safetensors")
    _write_timeline(folder, experiment.fleet)
    if experiment.evaluate.per_client and composition.data is not None:
        _write_clients(folder, experiment.task, state.x, experiment.pool)


def _write_timeline(folder: Path, fleet: DrivenFleet) -> None:
    """Who worked when and which server step took the reply, for the first jobs of an asynchronous run."""
    jobs = getattr(fleet, "timeline", [])
    if jobs:
        keys = ("client", "start", "finish", "round")
        lines = [json.dumps(dict(zip(keys, job, strict=True))) for job in jobs]
        write_whole(folder / "timeline.jsonl", "\n".join(lines) + "\n")


def _write_clients(folder: Path, task: Task, x: torch.Tensor, pool: Any) -> None:
    """How the final model does on every client's own data."""
    if len(task.num_examples) > MAX_CLIENTS_LISTED:
        return
    values = task.evaluate_clients(x, pool)
    counts = task.num_examples.tolist()
    columns = {k: v.tolist() for k, v in values.items()}
    lines = [
        encode_row({"client": i, "num_examples": n, **{k: v[i] for k, v in columns.items()}})
        for i, n in enumerate(counts)
        if n > 0
    ]
    write_whole(folder / "clients.jsonl", "\n".join(lines) + "\n")
