"""What the simulated fleet is made of: a device to compute on, links, byzantine clients, an executor, and memory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedsim.compose.refusals import check_absence, check_attack, check_link
from fedsim.compose.sections import ByzantineClients, File, Runtime
from fedsim.compose.work import Work
from fedsim.compress.sparsify import Identity
from fedsim.config import ConfigError, at
from fedsim.engine.choose import enough_stacks
from fedsim.memory import Memory
from fedsim.params import Layout
from fedsim.sim.absence import Absence
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.collectives import backend_for
from fedsim.sim.executor import Executor, StackRunner
from fedsim.sim.in_process import InProcess
from fedsim.sim.links import Downlink, Uplink, fitted
from fedsim.sim.place import Place, place, take_gpu
from fedsim.strategy import Strategy, compressors
from fedsim.task import Task

ROWS_KEPT = 2  # vectors of the model's size that a client is reckoned to keep: momentum and where it stands, say
CARD_SHARE, RAM_SHARE = 0.25, 0.5  # of a card and of this machine's RAM, for rows


def compute_device(name: str) -> torch.device:
    """Where stacks are computed.

    Raises:
        ConfigError: if there is no such device here.
    """
    if (here := place()) is not None and name != "cpu":
        if name not in ("auto", "cuda"):
            raise ConfigError(
                f"runtime.device: under torchrun each rank takes a GPU of its own; use cuda, not {name!r}"
            )
        take_gpu(here)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # torch knows others than those that it computes on here
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"runtime.device: unknown device {name!r}; use cpu, cuda, cuda:1 or auto")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cpu" or (device.index or 0) < cards:
        return device
    if cards:
        raise ConfigError(
            f"runtime.device: {name!r} was asked for, and {cards} GPU(s) are visible, numbered from 0; use one of "
            "these, or cuda"
        )
    if here is not None and here.local_size > 1:
        raise ConfigError(
            f"runtime.device: rank {here.rank} has no GPU: {here.local_size} ranks run on this machine, and each "
            "takes one; start at most as many a node as it has GPUs (--nproc_per_node), or set runtime.device=cpu"
        )
    raise ConfigError(f"runtime.device: {name!r} was asked for but no CUDA device is visible; use cpu or auto")


def with_compressors(strategy: Strategy, layout: Layout) -> Strategy:
    """The strategy, its own compressors bound to what travels.

    Raises:
        ConfigError: for a compressor that does not fit the model.
    """
    found = compressors(strategy)
    bound = {name: fitted(f"strategy.{name}", compressor, layout) for name, compressor in found.items()}
    changed = {name: compressor for name, compressor in bound.items() if compressor is not found[name]}
    return replace(strategy, **changed) if changed else strategy  # type: ignore[type-var]


def build_links(file: File, strategy: Strategy, layout: Layout) -> tuple[Uplink | None, Downlink | None]:
    """The compressed links of the sections `uplink` and `downlink`, None where nothing is compressed.

    Raises:
        ConfigError: for a compressor that does not fit the model or the strategy.
    """
    up, down = file.uplink, file.downlink
    made = []
    for key, compressor, own in (
        ("uplink", up.compressor, "compressor"),
        ("downlink", down.compressor, "server_compressor"),
    ):
        plain = isinstance(compressor, Identity)
        if not plain:
            check_link(key, strategy, own)
        bound = fitted(f"{key}.compressor", compressor, layout)
        made.append(None if plain else bound)
    uplink = None if made[0] is None else Uplink(compressor=made[0], error_feedback=up.error_feedback)
    return uplink, None if made[1] is None else Downlink(compressor=made[1], seed=file.seed)


def build_byzantine(section: ByzantineClients, task: Task, strategy: Strategy, seed: int) -> Byzantine | None:
    """Byzantine clients, None where all are honest; an attack on data poisons the task's samples here.

    Raises:
        ConfigError: for clients that do not exist, or an attack that task or strategy do not bear or is not defined.
    """
    with at("clients.byzantine"):
        ids = section.draw(len(task.num_examples), seed)
    if not len(ids):
        return None
    if section.attack.on_data:
        with at("clients.byzantine.attack"):
            task.poison(ids, section.attack)
    combine, counts = strategy.combining(), task.num_examples
    byzantine = Byzantine(
        ids=ids,
        attack=section.attack,
        seed=seed,
        rule=None if combine is None else lambda rows, whose: combine(rows, counts[whose]),
        mix=strategy.mixing(),
    )
    check_attack(byzantine, strategy, len(task.num_examples))
    return byzantine


def build_absence(file: File, strategy: Strategy, num_clients: int) -> Absence:
    """Who is away when, and which jobs die.

    Raises:
        ConfigError: where the strategy needs all clients in every step, or more than are ever there at once.
    """
    absence = Absence(
        availability=file.clients.availability(count=num_clients), dropout=file.clients.dropout, seed=file.seed
    )
    check_absence(absence, strategy, num_clients)
    return absence


def build_executor(
    runtime: Runtime, runner: StackRunner, work: Work, width: int, device: torch.device
) -> tuple[Executor, str]:
    """Where stacks run.

    Args:
        runtime: the file's section.
        runner: runs one stack.
        work: of a round.
        width: clients of a stack at most.
        device: to compute on.

    Returns:
        (executor, what it is in words): the ranks of a torchrun; Ray if asked for, with an address, or on several GPUs;
        threads otherwise. `stacks: auto` reckons with its workers, unless the file sets the width: then what it says is
        all that fixes the bits.

    Raises:
        ConfigError: if the file asks for another way than the one in which this process was started.
    """
    executor, workers, words = _executor(runtime, runner, work, width, device)
    if runtime.stacks != "auto":
        executor.stacks = runtime.stacks
    elif runtime.stack == "auto":
        executor.stacks = enough_stacks(work.cohort_size, width, workers, runner.task.layout, device)
    return executor, words


def build_memory(
    runtime: Runtime, rounds: int, work: Work, layout: Layout, executor: Executor, device: torch.device
) -> tuple[Memory, Literal["device", "ram", "disk"]]:
    """Where rows that clients keep between rounds lie.

    Args:
        runtime: the file's section.
        rounds: of the run.
        work: of a round.
        layout: of the model.
        executor: runs stacks; rows lie on the device only where that is this process's.
        device: to compute on.

    Returns:
        (memory without its folder, where it is). `auto` takes the device for a quarter of it at most, then half of the
        machine's RAM; it reckons with every client that may ever take part, and with one cohort's rows on their way.
    """
    n, kept = len(work.steps), runtime.memory
    on_device = device.type != "cpu" and isinstance(executor, InProcess)
    if kept == "auto":
        needed = 4 * layout.size * ROWS_KEPT * (min(n, rounds * work.cohort_size) + work.cohort_size)
        ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if on_device and needed <= CARD_SHARE * torch.cuda.get_device_properties(device).total_memory:
            kept = "device"
        else:
            kept = "ram" if needed <= RAM_SHARE * ram else "disk"
    if kept == "device" and not on_device:
        kept = "ram"  # a CPU's
    return Memory(n, device=device if kept == "device" else "cpu"), kept


def _executor(
    runtime: Runtime, runner: StackRunner, work: Work, width: int, device: torch.device
) -> tuple[Executor, int, str]:
    """(executor, stacks that it runs side by side, what it is in words)."""
    kind, here, costs = runtime.executor, place(), work.costs(runner.task.num_examples)
    if kind == "torchrun" and here is None:
        raise ConfigError(
            "runtime.executor: torchrun was asked for but did not start this process; run "
            "`torchrun --nproc_per_node N -m fedsim run CONFIG`, or use auto"
        )
    if here is not None and here.size > 1 and kind not in ("auto", "torchrun"):
        raise ConfigError(
            f"runtime.executor: {kind} under torchrun would make {here.size} runs of one; use torchrun or auto, or "
            "start fedsim without torchrun"
        )
    several = device == torch.device("cuda") and torch.cuda.device_count() > 1  # one that is named is used alone
    if here is not None and kind in ("auto", "torchrun"):
        return _ranks(here, runtime, runner, width, costs)
    if kind == "ray" or (kind == "auto" and (several or runtime.address is not None)):
        from fedsim.sim.ray_process import ray_executor

        _check_rows_travel(runtime, device)
        if device.index is not None:
            raise ConfigError(
                f"runtime.device: each Ray worker takes a GPU of its own; use cuda, not {str(device)!r}, or "
                "runtime.executor=in_process"
            )
        wanted = None if runtime.workers == "auto" else runtime.workers
        actors = ray_executor(
            runner,
            width=width,
            workers=wanted,
            threads=runtime.threads,
            address=runtime.address,
            collectives=runtime.collectives,
            costs=costs,
            timeout_seconds=runtime.timeout_seconds,
        )
        return actors, actors.num_workers, f"{actors.num_workers} Ray actors, {runtime.threads} thread(s) each"
    workers = _threads(runtime, device)
    pool = InProcess(runner, width=width, workers=workers, threads=runtime.threads)
    return pool, workers, f"{workers} thread(s) in this process, {runtime.threads} intra-op thread(s) each"


def _ranks(here: Place, runtime: Runtime, runner: StackRunner, width: int, costs: Tensor) -> tuple[Executor, int, str]:
    from fedsim.sim.ranks import Ranks

    backend = backend_for(runtime.collectives, gpus=runner.device.type == "cuda")
    if backend is None:
        raise ConfigError("runtime.collectives: object_store is Ray's, and torchrun has none; use auto, gloo or nccl")
    _check_rows_travel(runtime, runner.device)
    workers, threads = _threads(runtime, runner.device, here.local_size), runtime.threads
    what = f"{runner.device.type}, stacks of {width}, {threads} intra-op thread(s)"
    ranks = Ranks(runner, here, width=width, workers=workers, threads=threads, costs=costs, backend=backend, what=what)
    words = f"{here.size} ranks of torchrun, {workers} thread(s) each, {threads} intra-op thread(s) each"
    return ranks, here.size * workers, words


def _check_rows_travel(runtime: Runtime, device: torch.device) -> None:
    if runtime.memory == "device" and device.type != "cpu":
        raise ConfigError(
            "runtime.memory: device is for stacks that this process computes itself, and here others do; use "
            "auto, ram or disk"
        )


def _threads(runtime: Runtime, device: torch.device, processes: int = 1) -> int:
    """How many threads of one of several like processes run stacks."""
    if runtime.workers != "auto":
        return runtime.workers
    if device.type == "cuda":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // (runtime.threads * processes))
