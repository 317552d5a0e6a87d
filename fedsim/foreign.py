"""The third composition root: somebody else's Flower app becomes a run on virtual devices, into a run folder.

The file that goes with it says what the app does not: how many clients there are, how fast they are, and the seed. An
app is code, and runs with the rights of whoever runs it.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from fedsim.compose.entries import KINDS
from fedsim.compose.refusals import try_attack
from fedsim.compose.root import NOTES
from fedsim.compose.sections import ByzantineClients, Down, Up
from fedsim.compress.sparsify import Identity
from fedsim.config import Call, ConfigError, FromTable, at, decode, first_line, naming
from fedsim.flower.foreign.app import App
from fedsim.flower.foreign.channel import Channel
from fedsim.flower.foreign.clocks import Clocks, Steps
from fedsim.flower.foreign.grid import SimGrid
from fedsim.flower.foreign.nodes import Answering, NodeRunner
from fedsim.flower.foreign.replay import Replay
from fedsim.flower.foreign.rounds import RoundLog
from fedsim.flower.foreign.workers import NodeSetting, RayNodes
from fedsim.history import History
from fedsim.loop import ServerError
from fedsim.results import SUMMARY_FILE, check_folder, claimed, versions, write_config, write_summary
from fedsim.sim.absence import Absence, Dropout
from fedsim.sim.byzantine import Byzantine
from fedsim.sim.executor import Lost
from fedsim.sinks import JsonLines

REPLIES_FILE = "replies.bin"


@dataclass(frozen=True, kw_only=True)
class AppClients:
    """Who takes part.

    Args:
        count: N; node i + 1 has partition-id i.
        devices: how fast they are.
        availability: when they can be reached. Work whose client goes off line dies.
        dropout: work that dies by itself.
        byzantine: who attacks, and how.
        steps: what a message's work counts as, in steps of a device.
    """

    count: int = 10
    devices: Annotated[Any, FromTable("device", "constant")] = None
    availability: Annotated[Any, FromTable("availability", "always")] = None
    dropout: Dropout = field(default_factory=Dropout)
    byzantine: ByzantineClients = field(default_factory=ByzantineClients)
    steps: Steps = field(default_factory=Steps)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class AppRuntime:
    """How it computes; the threads alone may touch the last bits.

    Args:
        executor: in_process, where clients run one after the other, since the generators that an app draws from are one
            for a process; or ray.
        workers: Ray workers, each a process with one client at a time; auto is as many as there is room for.
        threads: intra-op threads of torch, of each worker.
        gpus: of each Ray worker.
        address: of a Ray cluster, all of whose nodes find the app's folder: "auto", "host:port", or null.
        timeout_seconds: seconds for one message, after which a Ray worker counts as hung and is replaced.
    """

    executor: Literal["in_process", "ray"] = "in_process"
    workers: int | Literal["auto"] = "auto"
    threads: int = 1
    gpus: int = 0
    address: str | None = None
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("threads", 1), ("gpus", 0)):
            value = getattr(self, name)
            if value != "auto" and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds must be positive seconds, got {self.timeout_seconds}")
        for name, here in (("workers", ("auto", 1)), ("gpus", (0,)), ("address", (None,))):
            if self.executor != "ray" and getattr(self, name) not in here:
                raise ValueError(f"{name} is of Ray workers; add executor: ray, or leave it out")


@dataclass(frozen=True, kw_only=True)
class AppFile:
    """A whole file of a Flower app's run.

    Args:
        app: the app's folder, with its pyproject.toml.
        seed: of every random number of the run.
        run_config: settings of the app itself that are to be different.
        clients: who takes part.
        uplink: what clients send.
        downlink: what clients receive.
        runtime: how it computes.
        keep: every reply and Context.state in the folder until the run is over, so that --resume can go on.
    """

    app: str
    seed: int = 0
    run_config: dict[str, bool | int | float | str] = field(default_factory=dict)
    clients: AppClients
    uplink: Up
    downlink: Down
    runtime: AppRuntime
    keep: bool = True


def run_app(
    raw: Mapping[str, Any],
    source: str,
    folder: Path,
    *,
    numbered: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> History:
    """Run an app to its end.

    Args:
        raw: the file's content after overrides; see `AppFile`.
        source: its name, for messages.
        folder: to write to.
        numbered: take the first free of `folder`-001, `folder`-002, ... instead.
        resume: play the folder's run again, with the replies that it had, and go on.
        quiet: show nothing but errors.

    Returns:
        The rows.

    Raises:
        ConfigError: for a mistake in the file or the app, or a resume of another run or of one that is complete.
        ValueError: if there is no Ray cluster, or no room for a worker.
        ServerError: if the app's server raised, or every message to its clients ended in an error.
        Lost: if Ray workers were lost time and again.
    """
    with naming(source):
        call: Call = decode(AppFile, {k: v for k, v in raw.items() if k not in NOTES}, "", KINDS)
        file, resolved = call(), copy.deepcopy(call.resolved)
        if not numbered:
            check_folder(folder, resume)
        if resume and (folder / SUMMARY_FILE).exists():
            raise ConfigError(f"{folder} holds a run that is complete; give another --out to run it anew")
        app = App.load(Path(file.app), file.run_config)
        clocks, channel = _clocks(file, app), _channel(file)
    resolved["run_config"] = app.run_config
    logging.getLogger("flwr").setLevel(logging.ERROR if quiet else logging.INFO)
    torch.set_num_threads(file.runtime.threads)
    with ExitStack() as stack:
        answers = _answering(file, app, stack)
        folder = stack.enter_context(claimed(folder, numbered))
        if not resume:
            write_config(folder / "config.yaml", {**resolved, "versions": versions()})
        rows = JsonLines()
        stack.callback(rows.close)
        rows.open(folder, resolved, 0 if resume else None)  # a resume writes all rows again
        if file.keep:
            settings = (file.seed, file.clients.count, sorted(app.run_config.items()))
            replay = Replay(folder / REPLIES_FILE, answers, settings)
            stack.callback(replay.close)
            answers = replay.answers
        _serve(app, SimGrid(answers, clocks, RoundLog(rows.write), _Errors(), channel), file)
    return _completed(folder)


def _completed(folder: Path) -> History:
    """A run that is over: its summary and its report are written, and what a resume would need goes."""
    history = History.load(folder)
    write_summary(folder, history, "the app's server returned")
    (folder / REPLIES_FILE).unlink(missing_ok=True)
    return history


def _clocks(file: AppFile, app: App) -> Clocks:
    """When the app's clients can be reached, and how fast they are.

    Raises:
        ConfigError: for absence that the app's server can't wait for in virtual time.
    """
    clients = file.clients
    absence = Absence(availability=clients.availability(count=clients.count), dropout=clients.dropout, seed=file.seed)
    if absence.away and app.is_older:
        raise ConfigError(
            "clients.availability: this app's server (ServerAppComponents) looks for its clients every few seconds of "
            "the wall clock, which has no place in virtual time; leave it out, or use clients.dropout"
        )
    devices = clients.devices(count=clients.count)
    return Clocks(count=clients.count, devices=devices, steps=clients.steps, absence=absence)


def _channel(file: AppFile) -> Channel:
    """What records become on their way.

    Raises:
        ConfigError: for byzantine clients that do not exist, or an attack that is none on replies of an app.
    """
    section, byzantine = file.clients.byzantine, None
    with at("clients.byzantine"):
        ids = section.draw(file.clients.count, file.seed)
    if len(ids):
        if section.attack.on_data:
            raise ConfigError(
                "clients.byzantine.attack: poisons data, and an app's data are its own; take one on vectors"
            )
        byzantine = Byzantine(ids=ids, attack=section.attack, seed=file.seed)
        try_attack(byzantine, file.clients.count - len(ids), len(ids))
    up, down = (None if isinstance(c, Identity) else c for c in (file.uplink.compressor, file.downlink.compressor))
    return Channel(
        count=file.clients.count,
        seed=file.seed,
        uplink=up,
        downlink=down,
        error_feedback=file.uplink.error_feedback,
        byzantine=byzantine,
    )


def _answering(file: AppFile, app: App, stack: ExitStack) -> Answering:
    """Who computes what the app's nodes answer, until the stack is left.

    Raises:
        ValueError: if there is no Ray cluster, or no room for a worker.
    """
    runtime, own = file.runtime, (file.clients.count, app.run_config, file.seed)
    if runtime.executor == "in_process":
        return NodeRunner(app.client, *own).answers
    nodes = RayNodes(
        NodeSetting(app.folder, app.client_reference, *own),
        workers=None if runtime.workers == "auto" else runtime.workers,
        threads=runtime.threads,
        gpus=runtime.gpus,
        address=runtime.address,
        timeout_seconds=runtime.timeout_seconds,
    )
    stack.callback(nodes.close)
    return nodes.answers


def _serve(app: App, grid: SimGrid, file: AppFile) -> None:
    """Call the app's server.

    Raises:
        ServerError: if it raised, or every message to its clients ended in an error.
        Lost: if Ray workers were lost time and again.
    """
    log = grid.log
    try:
        app.serve(grid, file.seed)
    except (ConfigError, Lost):
        raise
    except (Exception, SystemExit) as e:
        when = f"in round {log.round}" if log.round else "before its first round"
        raise ServerError(f"{file.app}: its ServerApp failed {when}: {first_line(e)}") from e
    finally:
        grid.close()
    if log.errors and not log.replies:
        raise ServerError(f"{file.app}: all {log.errors} messages to clients ended in errors; the first is shown above")


class _Errors:
    """Shows errors of clients: the first with its traceback, of the others that they were."""

    def __init__(self) -> None:
        self._first = True

    def __call__(self, node: int, reason: str) -> None:
        last = reason.strip().rpartition("\n")[2]
        print(f"fedsim: client {node - 1} raised: {reason if self._first else last}", file=sys.stderr)
        self._first = False
