"""The loop: for each round, one call of the strategy; then evaluate, log, and now and then save everything.

A round is one server step and nothing else: `state, metrics = strategy.round(state, fleet, rng)`. The loop knows
neither how clients are reached nor what the strategy's state is made of.
"""

from __future__ import annotations

import signal
import threading
import time
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import checkpoint
from fedsim.config import ConfigError, place
from fedsim.fleet import DrivenFleet
from fedsim.metrics import spread
from fedsim.sim.executor import ClientError
from fedsim.sinks import Sink
from fedsim.strategy import Strategy
from fedsim.streams import server_rng
from fedsim.task import Pool, Task


class Diverged(RuntimeError):
    """The model or a loss is not finite any more."""


class ServerError(RuntimeError):
    """A server half raised; the message names strategy and round, and the cause is its own exception."""


class Interrupted(RuntimeError):
    """Ctrl-C; the run was saved and can be resumed."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """When and what to evaluate.

    Args:
        every: rounds between evaluations (the last round is always evaluated).
        per_client: also the spread over every client's own data.
    """

    every: int = 5
    per_client: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 round, got {self.every}")


@dataclass(frozen=True, kw_only=True)
class Stop:
    """What ends a run before its last round; the first that holds does.

    Args:
        virtual_seconds, bits_up, bits_down: ends when at least so much was used.
        test_accuracy: ends when reached. test_loss, distance: ends when as small.
    """

    virtual_seconds: float | None = None
    bits_up: float | None = None
    bits_down: float | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    distance: float | None = None

    def __post_init__(self) -> None:
        if self.test_accuracy is not None and not 0 <= self.test_accuracy <= 1:
            raise ValueError(f"test_accuracy is a share and must lie in [0, 1], got {self.test_accuracy:g}")

    def reason(self, row: Mapping[str, Any]) -> str | None:
        """Why this row ends the run, or None."""
        for name, bound in asdict(self).items():
            if bound is None or row.get(name) is None:
                continue
            small = name in ("test_loss", "distance")
            if row[name] <= bound if small else row[name] >= bound:
                return f"{name} {row[name]:.6g} reached {bound:.6g}"
        return None


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
) -> tuple[Any, list[dict[str, Any]], str]:
    """Run an experiment.

    Args:
        experiment: what to run.
        sinks: where rows go, opened by the caller.
        folder: the run's folder, for checkpoints; None keeps nothing.
        resume: go on from the newest checkpoint in `folder`.
        watch: called with every row, for a progress line.

    Returns:
        (final state, rows of this call, why it ended).

    Raises:
        Diverged: if the model is not finite; the rows so far are written.
        ClientError, ServerError: if a half of the strategy raised.
        ConfigError: if the strategy found that its settings don't fit, or a checkpoint can't be read or written.
        Interrupted: after Ctrl-C, once the running round is finished and saved.
    """
    with _threads(experiment.threads):
        return _train(experiment, sinks, folder, resume, watch)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The server's own sums run on as many intra-op threads as a worker's, so that no number of cores shows in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    experiment: Experiment, sinks: Sequence[Sink], folder: Path | None, resume: bool, watch: Watch
) -> tuple[Any, list[dict[str, Any]], str]:
    run = _Run(experiment, folder)
    if resume:
        run.restore()
    rows: list[dict[str, Any]] = []
    reason = experiment.stop.reason(run.last)
    with _Interrupt() as interrupt:
        while run.round < experiment.rounds and not reason:
            row = run.step()
            rows.append(row)
            for sink in sinks:
                sink.write(row)
            watch(row)
            if not experiment.allow_divergence:
                run.check_finite(row)
            reason = experiment.stop.reason(row)
            every = experiment.checkpoint.every
            if interrupt.asked or reason or run.round == experiment.rounds or (every and run.round % every == 0):
                run.save()
            if interrupt.asked and not reason and run.round < experiment.rounds:
                raise Interrupted(f"stopped after round {run.round}")
    return run.state, rows, reason or f"all {experiment.rounds} rounds done"


class _Run:
    """A run in progress."""

    def __init__(self, experiment: Experiment, folder: Path | None) -> None:
        self.experiment = experiment
        self.folder = folder / "checkpoints" if folder else None
        self.state = experiment.strategy.init(experiment.task.init(experiment.seed).to(experiment.device))
        if not isinstance(getattr(self.state, "x", None), Tensor):
            made = f"{type(experiment.strategy).__name__}.init returned a {type(self.state).__name__}"
            raise ConfigError(f"{made}; return a dataclass whose field x is the server's model [P]")
        self.round = 0
        self.last: dict[str, Any] = {}
        self._before = 0.0
        self._started = time.perf_counter()

    def step(self) -> dict[str, Any]:
        """One round, and its row."""
        e, fleet = self.experiment, self.experiment.fleet
        rng = server_rng(e.seed, "server", self.round)
        self.state, own = self._server_half(rng)
        self.round += 1
        row: dict[str, Any] = {
            "round": self.round,
            "virtual_seconds": fleet.now,
            "wall_seconds": self._before + time.perf_counter() - self._started,
            "bits_up": fleet.ledger.bits_up,
            "bits_down": fleet.ledger.bits_down,
            **fleet.end_round().values(),
            **own,
        }
        if self.round % e.evaluate.every == 0 or self.round == e.rounds:
            row |= self.evaluation()
        self.last = row
        return row

    def _server_half(self, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
        strategy, number = self.experiment.strategy, self.round + 1
        try:
            return strategy.round(self.state, self.experiment.fleet, rng)
        except (ClientError, ConfigError):
            raise
        except Exception as e:
            if isinstance(e, ValueError) and place(e, strategy) is None:
                raise ConfigError(f"round {number}: {type(strategy).__name__}: {e}") from e
            name = f"{type(strategy).__name__}.round"
            raise ServerError(f"{name} failed in round {number}: {type(e).__name__}: {e}") from e

    def evaluation(self) -> dict[str, Any]:
        """Metrics of the server's model: held out, and over every client's own data."""
        e, x = self.experiment, self.state.x
        out: dict[str, Any] = dict(e.task.evaluate(x, e.pool))
        if e.task.layout.size <= 16 and "distance" in out:
            out["x"] = x.tolist()
        if e.evaluate.per_client:
            for name, values in e.task.evaluate_clients(x, e.pool).items():
                has_data = torch.isfinite(values) | (e.task.num_examples > 0)
                found = spread(values, has_data.to(torch.float64), higher_is_better=name != "loss")
                out |= {f"client_{name}_{k}": v for k, v in found.items()}
        return out

    def check_finite(self, row: Mapping[str, Any]) -> None:
        bad = [k for k, v in row.items() if isinstance(v, float) and not isfinite(v)]
        if not bad and not bool(torch.isfinite(self.state.x).all()):
            bad = ["the model"]
        if bad:
            raise Diverged(
                f"round {self.round}: {', '.join(bad)} not finite, the run diverged; lower local.optimizer.lr or "
                "strategy.server_lr, clip gradients (local.optimizer.clip), or set allow_divergence=true to go on"
            )

    def save(self) -> None:
        if self.folder is not None:
            wall = self._before + time.perf_counter() - self._started
            parts = {
                "round": self.round,
                "wall_seconds": wall,
                "strategy": self.state,
                "fleet": self.experiment.fleet.state(),
                "config": fingerprint(self.experiment.config),
                "last": {k: self.last[k] for k in asdict(self.experiment.stop) if k in self.last},
            }
            checkpoint.save(self.folder, self.round, parts)

    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        assert self.folder is not None
        found = checkpoint.checkpoints(self.folder)
        if not found:
            return
        here, there = fingerprint(self.experiment.config), checkpoint.peek(found[-1], "config")
        changed = sorted(k for k in {*here, *there} if here.get(k) != there.get(k))
        if changed:
            verb = "differs" if len(changed) == 1 else "differ"
            chosen = " ".join(
                f"{k}={literal_eval(there[k])}" for k in changed if k.startswith("runtime.") and k in there
            )
            same = f"overrides (where `auto` chose: {chosen})" if chosen else "overrides"
            raise ConfigError(
                f"{found[-1]}: belongs to another config ({', '.join(changed)} {verb}); resume with the same file and "
                f"{same}, or start anew in another folder"
            )
        classes = checkpoint.classes_of(self.state) | self.experiment.fleet.state_classes
        saved = checkpoint.load(found[-1], classes)
        self.state = checkpoint.to_device(saved["strategy"], self.experiment.device)
        self.experiment.fleet.load(saved["fleet"])
        self.round, self._before, self.last = saved["round"], saved["wall_seconds"], saved["last"]
        if self.round > self.experiment.rounds:
            raise ConfigError(
                f"rounds: {self.folder.parent} already has {self.round}, more than {self.experiment.rounds}; give at "
                "least as many to go on, or start anew in another folder"
            )


FREE_TO_CHANGE = ("rounds", "stop", "log", "checkpoint", "versions", "allow_divergence")
"""Sections that may differ on resume: they change how long a run is or what is kept of it, not its numbers."""


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """One text per section, to compare the config of a checkpoint with today's."""
    out = {k: repr(v) for k, v in config.items() if k not in (*FREE_TO_CHANGE, "runtime")}
    runtime = config.get("runtime", {})
    bits = ("engine", "stack", "precision", "threads", "device")
    return out | {f"runtime.{k}": repr(runtime[k]) for k in bits if k in runtime}


class _Interrupt:
    """Turns the first Ctrl-C into a wish to stop after this round; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._old: Any = None
        self._main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Interrupt:
        if self._main:
            self._old = signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._old)
