"""What the simulated fleet is made of: a device to compute on, links, byzantine clients, and an executor."""

from __future__ import annotations

import os

import torch

from fedsim.compose.refusals import check_compressor, check_link
from fedsim.compose.sections import ByzantineClients, File, Runtime
from fedsim.compress.sparsify import Identity
from fedsim.config import ConfigError, at
from fedsim.engine.choose import enough_stacks
from fedsim.params import Layout
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.executor import Executor, InProcess, StackRunner
from fedsim.sim.links import Downlink, Uplink
from fedsim.strategy import Strategy, compressors
from fedsim.task import Task


def compute_device(name: str) -> torch.device:
    """Where stacks are computed.

    Raises:
        ConfigError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"runtime.device: unknown device {name!r}; use cpu, cuda, cuda:1 or auto") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device: {name!r} was asked for but no CUDA device is visible; use cpu or auto")
    return device


def build_links(file: File, strategy: Strategy, layout: Layout) -> tuple[Uplink | None, Downlink | None]:
    """The compressed links of the sections `uplink` and `downlink`, None where nothing is compressed.

    Raises:
        ConfigError: for a compressor that does not fit the model or the strategy.
    """
    up, down = file.uplink, file.downlink
    own = compressors(strategy)
    for name, compressor in own.items():
        check_compressor(f"strategy.{name}", compressor, layout)
    made = []
    for key, compressor in (("uplink", up.compressor), ("downlink", down.compressor)):
        plain = isinstance(compressor, Identity)
        if not plain:
            check_link(key, strategy.traits, list(own))
        check_compressor(f"{key}.compressor", compressor, layout)
        made.append(None if plain else compressor.bind(layout))
    if made[0] is None and up.error_feedback:
        raise ConfigError("uplink.error_feedback: needs an uplink.compressor that leaves something out")
    uplink = None if made[0] is None else Uplink(compressor=made[0], error_feedback=up.error_feedback)
    return uplink, None if made[1] is None else Downlink(compressor=made[1], seed=file.seed)


def build_byzantine(section: ByzantineClients, task: Task, seed: int) -> Byzantine | None:
    """Byzantine clients, None where all are honest; an attack on data poisons the task's labels here.

    Raises:
        ConfigError: for clients that do not exist, or an attack that the task does not have data for.
    """
    with at("clients.byzantine"):
        ids = section.draw(len(task.num_examples), seed)
    if not len(ids):
        return None
    if section.attack.on_data:
        with at("clients.byzantine.attack"):
            task.poison(ids, section.attack.poison)
    return Byzantine(ids=ids, attack=section.attack, on_data=section.attack.on_data, seed=seed)


def build_executor(
    runtime: Runtime, runner: StackRunner, width: int, cohort_size: int, device: torch.device
) -> tuple[Executor, int, str]:
    """(executor, least number of stacks, what it is in words).

    Ray if asked for, with an address, or on several GPUs; threads otherwise. `stacks: auto` reckons with its workers,
    unless the file sets the width: then what it says is all that fixes the bits.
    """

    def stacks_for(workers: int) -> int:
        if runtime.stacks != "auto":
            return runtime.stacks
        if runtime.stack != "auto":
            return 1
        return enough_stacks(cohort_size, width, workers, runner.task.layout, device)

    several = device.type == "cuda" and torch.cuda.device_count() > 1
    ray = runtime.executor == "ray" or (runtime.executor == "auto" and (several or runtime.address is not None))
    workers: int | None = None if runtime.workers == "auto" else runtime.workers
    if ray:
        from fedsim.sim.ray_executor import RayExecutor

        actors = RayExecutor(runner, width=width, workers=workers, threads=runtime.threads, address=runtime.address)
        actors.stacks = stacks_for(actors.num_workers)
        return actors, actors.stacks, f"{actors.num_workers} Ray actors, {runtime.threads} thread(s) each"
    if workers is None:
        workers = 1 if device.type == "cuda" else max(1, len(os.sched_getaffinity(0)) // runtime.threads)
    here = InProcess(runner, width=width, workers=workers, threads=runtime.threads)
    here.stacks = stacks_for(workers)
    return here, here.stacks, f"{workers} thread(s) in this process, {runtime.threads} intra-op thread(s) each"
