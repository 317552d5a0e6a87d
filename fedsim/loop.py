"""The loop: for each round, one call of the strategy; then evaluate, log, and now and then save everything.

A round is one server step and nothing else: `state, metrics = strategy.round(state, fleet, rng)`. The loop knows
neither how clients are reached nor what the strategy's state is made of.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from fedsim import checkpoint
from fedsim.config import ConfigError, place
from fedsim.evaluation import Evaluate
from fedsim.files import sync
from fedsim.fleet import DrivenFleet
from fedsim.metrics import check_names
from fedsim.sim.executor import ClientError, Lost
from fedsim.sinks import METRICS_FILE, Sink, rows_in_order
from fedsim.stop import Course, Stop
from fedsim.strategy import Strategy, begin, step
from fedsim.streams import server_rng
from fedsim.task import Pool, Task


class Diverged(RuntimeError):
    """The model or a loss is not finite any more."""


class ServerError(RuntimeError):
    """A server half raised; the message names strategy and round, and the cause is its own exception."""


class Interrupted(RuntimeError):
    """A signal (SIGINT of Ctrl-C, SIGTERM of a cluster) ended the run, which was saved and can be resumed."""

    def __init__(self, round: int, number: int) -> None:
        super().__init__(f"stopped after round {round}")
        self.exit_code = 128 + number


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save.

    Args:
        every: rounds between checkpoints; null saves only when interrupted and at the end.
    """

    every: int | None = 20

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be at least 1 round or null, got {self.every}")


@dataclass(kw_only=True)
class Experiment:
    """Everything a run consists of, built by the composition root from an experiment file (or by hand)."""

    task: Task
    strategy: Strategy
    fleet: DrivenFleet
    pool: Pool
    rounds: int
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Evaluate = field(default_factory=Evaluate)
    stop: Stop = field(default_factory=Stop)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    allow_divergence: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1


Watch = Callable[[Mapping[str, Any]], None]


def train(
    experiment: Experiment,
    *,
    sinks: Sequence[Sink] = (),
    folder: Path | None = None,
    resume: bool = False,
    watch: Watch = lambda row: None,
    started: Callable[[], None] = lambda: None,
) -> tuple[Any, list[dict[str, Any]], str]:
    """Run an experiment.

    Args:
        experiment: what to run.
        sinks: where rows go, opened and closed here; they need a folder.
        folder: the run's folder, for checkpoints; None keeps nothing.
        resume: go on from the newest sound checkpoint in `folder`, as far as the rows of its metrics.jsonl reach.
        watch: called with every row, for a progress line.
        started: called once when nothing can be refused any more, before anything is written.

    Returns:
        (final state, rows of this call, why it ended).

    Raises:
        Diverged: if the model is not finite; the rows so far are written.
        ClientError, ServerError: if a half of the strategy raised.
        ConfigError: if the strategy found that its settings don't fit, or a checkpoint can't be read or written.
        Interrupted: after Ctrl-C or SIGTERM, once the running round is finished and saved.
    """
    with _threads(experiment.threads), ExitStack() as stack:
        run = _Run(experiment, folder)
        if resume:
            run.restore()
        started()
        for sink in sinks:
            assert folder is not None, "sinks write to a folder"
            stack.callback(sink.close)
            sink.open(folder, experiment.config, run.round if resume else None)
        return _rounds(run, sinks, watch)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The server's own sums run on as many intra-op threads as a worker's, so that no number of cores shows in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _named(strategy: Strategy, half: str, when: str) -> Iterator[None]:
    """What a server half raises is named by strategy and round; a ValueError of ours is a mistake of the file."""
    try:
        yield
    except (ClientError, ConfigError, Lost):
        raise
    except Exception as e:
        name = type(strategy).__name__
        if isinstance(e, ValueError) and place(e, strategy) is None:
            raise ConfigError(f"{when}: {name}: {e}") from e
        raise ServerError(f"{name}.{half} failed in {when}: {type(e).__name__}: {e}") from e


def _rounds(run: _Run, sinks: Sequence[Sink], watch: Watch) -> tuple[Any, list[dict[str, Any]], str]:
    experiment = run.experiment
    rows: list[dict[str, Any]] = []
    with _interruptible() as asked:
        while run.round < experiment.rounds and not run.course.ended:
            row = run.step()
            rows.append(row)
            for sink in sinks:
                sink.write(row)
            watch(row)
            if not experiment.allow_divergence:
                run.check_finite(row)
            reason = run.course.ended
            every = experiment.checkpoint.every
            if asked or reason or run.round == experiment.rounds or (every and run.round % every == 0):
                run.save()
            if asked and not reason and run.round < experiment.rounds:
                raise Interrupted(run.round, asked[0])
    if not experiment.allow_divergence and (what := run.course.exploded()):
        warnings.warn(what, stacklevel=2)
    return run.state, rows, run.course.ended or f"all {experiment.rounds} rounds done"


class _Run:
    """A run in progress."""

    def __init__(self, experiment: Experiment, folder: Path | None) -> None:
        self.experiment = experiment
        self.folder = folder / "checkpoints" if folder else None
        with _named(experiment.strategy, "init", "the start"):
            self.state = begin(experiment.strategy, experiment.task.init(experiment.seed).to(experiment.device))
        self.round = 0
        self.course = Course(experiment.stop)
        self._started = time.perf_counter()  # less the seconds of the calls that this one goes on from

    def step(self) -> dict[str, Any]:
        """One round, and its row."""
        e, fleet = self.experiment, self.experiment.fleet
        rng = server_rng(e.seed, "server", self.round)
        self.state, own = self._server_half(rng)
        self.round += 1
        check_names(own, type(e.strategy).__name__)
        row: dict[str, Any] = {
            "round": self.round,
            "virtual_seconds": fleet.now,
            "wall_seconds": time.perf_counter() - self._started,
            "bits_up": fleet.ledger.bits_up,
            "bits_down": fleet.ledger.bits_down,
            **fleet.end_round().values(),
            **own,
        }
        evaluates = self.round % e.evaluate.every == 0 or self.round == e.rounds
        if evaluates:
            row |= self.evaluation()
        if self.course.take(row) and not evaluates:
            row |= self.evaluation()  # the last round of a run is evaluated whatever ends it
        elif evaluates:
            self.course.check_known()
        return row

    def _server_half(self, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
        with _named(self.experiment.strategy, "round", f"round {self.round + 1}"):
            return step(self.experiment.strategy, self.state, self.experiment.fleet, rng)

    def evaluation(self) -> dict[str, Any]:
        """Metrics of the server's model, and of clients' own."""
        e = self.experiment
        return e.evaluate.metrics(e.task, e.strategy, e.fleet, self.state.x, e.pool)

    def check_finite(self, row: Mapping[str, Any]) -> None:
        bad = [k for k, v in row.items() if isinstance(v, float) and not isfinite(v)]
        if not bad and not bool(torch.isfinite(torch.stack(torch.aminmax(self.state.x))).all()):
            bad = ["the model"]
        if bad:
            raise Diverged(
                f"round {self.round}: {', '.join(bad)} not finite, the run diverged; lower local.optimizer.lr or "
                "strategy.server_lr, clip gradients (local.optimizer.clip), or set allow_divergence=true to go on"
            )

    def save(self) -> None:
        if self.folder is None:
            return
        rows = self.folder.parent / METRICS_FILE
        if rows.exists():
            sync(rows)  # first, or after a power cut the checkpoint might know of rounds that the file does not
        parts = {
            "round": self.round,
            "wall_seconds": time.perf_counter() - self._started,
            "strategy": self.state,
            "fleet": self.experiment.fleet.state(),
            "config": fingerprint(self.experiment.config),
        }
        checkpoint.save(self.folder, self.round, parts)

    def restore(self) -> None:
        """Go on from the newest sound checkpoint whose rows are all there; from the start if none was ever made."""
        assert self.folder is not None
        rows = rows_in_order(self.folder.parent / METRICS_FILE)
        trouble: list[str] = []
        for path in reversed(checkpoint.checkpoints(self.folder)):
            try:
                self._restore(checkpoint.load(path), rows)
                break
            except checkpoint.Damaged as e:
                trouble.append(str(e))
        found = f"{self.folder}: {'; '.join(trouble)}"
        if trouble and not self.round:
            raise ConfigError(f"{found}; there is no other to go on from, start anew in another folder")
        if trouble:
            warnings.warn(f"{found}; going on from round {self.round} instead", stacklevel=2)

    def _restore(self, found: checkpoint.Saved, rows: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a checkpoint.

        Raises:
            Damaged: if it can't be gone on from, but another may.
            ConfigError: if it belongs to another run than this one.
        """
        e, path = self.experiment, found.path
        _check_same(path, fingerprint(e.config), found.take("config"))
        saved = found.take("strategy", checkpoint.classes_of(self.state), e.device)
        fleet = found.take("fleet", e.fleet.state_classes, e.device)
        round, before = found.take("round"), found.take("wall_seconds")
        layout = e.task.layout
        wrong = checkpoint.misfit(saved, self.state, (layout.size, layout.num_trainable))
        if wrong is None and round > len(rows):
            wrong = f"{METRICS_FILE} lacks row {len(rows) + 1} or holds it twice"
        if wrong:
            raise checkpoint.Damaged(f"{path.name}: {wrong}")
        if round > e.rounds:
            raise ConfigError(
                f"rounds: {path.parents[1]} already has {round}, more than {e.rounds}; give at least as many to go on, "
                "or start anew in another folder"
            )
        e.fleet.load(fleet)
        self.state, self.round, self.course = saved, round, Course(e.stop, rows[:round])
        self._started -= before


def _check_same(path: Path, here: Mapping[str, str], there: Mapping[str, str]) -> None:
    """Refuse the checkpoint of another config."""
    changed = sorted(k for k in {*here, *there} if here.get(k) != there.get(k))
    if changed:
        verb = "differs" if len(changed) == 1 else "differ"
        chosen = " ".join(f"{k}={literal_eval(there[k])}" for k in changed if k.startswith("runtime.") and k in there)
        same = f"overrides (where `auto` chose: {chosen})" if chosen else "overrides"
        raise ConfigError(
            f"{path}: belongs to another config ({', '.join(changed)} {verb}); resume with the same file and {same}, "
            "or start anew in another folder"
        )


FREE_TO_CHANGE = ("rounds", "stop", "log", "checkpoint", "versions", "allow_divergence")
"""Sections that may differ on resume: they change how long a run is or what is kept of it, not its numbers."""


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """One text per section, to compare the config of a checkpoint with today's."""
    out = {k: repr(v) for k, v in config.items() if k not in (*FREE_TO_CHANGE, "runtime")}
    runtime = config.get("runtime", {})
    bits = ("engine", "stack", "stacks", "native", "precision", "threads", "device")
    return out | {f"runtime.{k}": repr(runtime[k]) for k in bits if k in runtime}


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Signals that asked to stop after this round: Ctrl-C and SIGTERM. A second Ctrl-C stops at once."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
