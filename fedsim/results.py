"""A run's folder: whether it holds one, who may write there, and what is left in it: config.yaml (resolved, with
versions), env.json, metrics.jsonl, summary.json, model.safetensors, model.best.safetensors, clients.jsonl,
devices.jsonl (of a deployment), timeline.jsonl, split.npz, topology.npz (of peers), pictures.npz (of the model),
checkpoints/ and report.html.
"""

from __future__ import annotations

import io
import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.best import Best, best_row
from fedsim.compose import Composition
from fedsim.config import ConfigError
from fedsim.experiment import Experiment
from fedsim.files import held, write_tensors, write_whole
from fedsim.fleet import DrivenFleet
from fedsim.history import BEST_FILE, MODEL_FILE, History
from fedsim.overrides import read_file
from fedsim.sinks import METRICS_FILE, encode_row
from fedsim.strategies.peers import Peers
from fedsim.topology import overview

SUMMARY_FILE = "summary.json"
FILES = (
    *("config.yaml", "env.json", "split.npz", "topology.npz", "metrics.jsonl", SUMMARY_FILE, MODEL_FILE, BEST_FILE),
    *("clients.jsonl", "devices.jsonl", "timeline.jsonl", "pictures.npz", "report.html"),
)
PACKAGES = ("torch", "numpy", "ray", "flwr", "safetensors")
MAX_CLIENTS_LISTED = 100_000
CHOSEN_ONCE = ("engine", "native", "stack", "stacks")  # by `auto`, when a run begins


def as_it_began(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A file to resume by: what it leaves to `auto` and fixes the bits is as the folder's run has it.

    So a run goes on to the same bits with more or fewer workers, for which `auto` might choose otherwise.

    Args:
        raw: the file's content after overrides.
        folder: of the run.

    Raises:
        ConfigError: if the folder's own file is damaged.
    """
    path, said = folder / "config.yaml", raw.get("runtime") or {}
    began = read_file(path).get("runtime", {}) if path.exists() and isinstance(said, Mapping) else {}
    kept = {k: v for k, v in began.items() if k in CHOSEN_ONCE and "auto" == said.get(k, "auto") != v}
    return {**raw, "runtime": {**said, **kept}} if kept else dict(raw)


def holds_run(folder: Path) -> bool:
    """Whether a run has begun to write there."""
    return (folder / METRICS_FILE).exists() or (folder / "config.yaml").exists()


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse to mix two runs in one folder.

    Raises:
        ConfigError: if the folder holds a run and this is no resume, or holds none and it is.
    """
    if holds_run(folder) and not resume:
        raise ConfigError(f"{folder} already holds a run; add --resume to go on with it or give another --out")
    if resume and not holds_run(folder):
        raise ConfigError(f"{folder} holds no run to resume; leave out --resume to start one there")


def last_folder(stem: Path) -> Path:
    """The newest of the folders `stem`-NNN that holds a run, for --resume without --out.

    Raises:
        ConfigError: if there is none.
    """
    numbered = {p: p.name.removeprefix(f"{stem.name}-") for p in stem.parent.glob(f"{stem.name}-*") if holds_run(p)}
    found = [p for p, number in numbered.items() if number.isdigit()]
    if not found:
        raise ConfigError(f"{stem.parent} holds no run of {stem.name}; leave out --resume to start one, or give --out")
    return max(found, key=lambda p: int(numbered[p]))


@contextmanager
def claimed(folder: Path, numbered: bool) -> Iterator[Path]:
    """The run's folder, made if need be, and kept to this run while it lasts."""
    for k in count(1):
        mine = folder.with_name(f"{folder.name}-{k:03d}") if numbered else folder
        try:
            mine.mkdir(parents=True, exist_ok=not numbered)  # one of two that start at once makes it
            break
        except FileExistsError:
            if not numbered:
                raise
    with held(mine):
        yield mine


def write_inputs(folder: Path, composition: Composition) -> None:
    """What is known before the first round; a resume adds what is missing, and what it may change of the config.

    Halves of files that a run left which was killed go.
    """
    for half in (folder / f"{name}.part" for name in FILES):
        if half.is_file():
            half.unlink()
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
    data = None if composition.samples is None else composition.samples.data
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
    _write_rows(folder / "devices.jsonl", experiment.fleet.devices())
    _write_pictures(folder, experiment.task.pictures(x))
    if experiment.evaluate.per_client and composition.samples is not None:
        _write_clients(folder, experiment, x)
    more: dict[str, Any] = {}
    if (best := best_row(history.rows, "test_accuracy")) is not None:
        more["best_test_accuracy"] = best["test_accuracy"]
    write_summary(folder, history, why, **more)


def write_summary(folder: Path, history: History, why: str, **more: Any) -> None:
    """How a run with these rows ended, and why; then its report, without which it is complete all the same."""
    final = {key: history.last(key) for key in history.keys()}
    summary = {"rounds": len(history), "ended": why, "final": json.loads(encode_row(final)), **more}
    write_whole(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
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
    """The model of the round in which `checkpoint.best` was best so far; no file where that was not kept."""
    if best.x is None:
        (folder / BEST_FILE).unlink(missing_ok=True)
        return
    _write_model(folder / BEST_FILE, composition, best.x, {best.metric: best.value, "round": best.round})


def _write_model(path: Path, composition: Composition, x: Tensor, notes: Mapping[str, Any] = {}) -> None:
    """A module's state dict, or a formula's own tensors, of x [P]; beside it what the module was made for."""
    samples = composition.samples
    if samples is not None:
        tensors = samples.layout.state_dict(x.cpu(), samples.module)
    else:
        tensors = {k: v.contiguous() for k, v in composition.experiment.task.layout.views(x.cpu()).items()}
    write_tensors(path, tensors, {"fedsim": json.dumps({"sizes": samples and samples.sizes, **notes})})


def _write_pictures(folder: Path, pictures: Mapping[str, Tensor]) -> None:
    """What the task shows of the final model, as bytes, for the report."""
    if pictures:
        content = io.BytesIO()
        shades: dict[str, Any] = {
            title: (255 * images).round().to(torch.uint8).cpu().numpy() for title, images in pictures.items()
        }
        np.savez_compressed(content, **shades)
        write_whole(folder / "pictures.npz", content.getvalue())


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
    trained = (task.num_examples > 0).nonzero()[:, 0]
    _write_rows(folder / "clients.jsonl", {"num_examples": task.num_examples, **values}, trained)


def _write_rows(path: Path, columns: Mapping[str, Tensor], clients: Tensor | None = None) -> None:
    """A line for each of some clients (all by default) of columns {name: [N]}; no file without columns."""
    if not columns:
        return
    ids = torch.arange(len(next(iter(columns.values())))) if clients is None else clients
    rows = {name: column[ids].tolist() for name, column in columns.items()}
    lines = [encode_row({"client": i, **{k: v[row] for k, v in rows.items()}}) for row, i in enumerate(ids.tolist())]
    write_whole(path, "\n".join(lines) + "\n")
