"""The loop: for each round, one call of the strategy; then evaluate, log, and now and then save everything.

A round is one server step and nothing else: `state, metrics = strategy.round(state, fleet, rng)`. The loop knows
neither how clients are reached nor what the strategy's state is made of.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.best import Best, best_of, check_named
from fedsim.config import ConfigError, place
from fedsim.experiment import Experiment
from fedsim.metrics import check_names, without_value
from fedsim.observers import observing
from fedsim.pages import room_on_gpu
from fedsim.resume import Standing, newest, save
from fedsim.signals import interruptible
from fedsim.sim.executor import ClientError, Lost
from fedsim.sinks import Sink
from fedsim.stop import Course, Diverged
from fedsim.strategy import Strategy, begin, step
from fedsim.streams import server_rng

SMALLER = "lower runtime.stack if above 1, or local.batch_size, take a smaller model, or set runtime.device=cpu"


class ServerError(RuntimeError):
    """A server half raised; the message names strategy and round, and the cause is its own exception."""


class Interrupted(RuntimeError):
    """A signal (SIGINT of Ctrl-C, SIGTERM of a cluster) ended the run, which was saved and can be resumed."""

    def __init__(self, round: int, number: int) -> None:
        super().__init__(f"stopped after round {round}")
        self.exit_code = 128 + number


Watch = Callable[[Mapping[str, Any]], None]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """A round has as many intra-op threads as a worker: no number of cores shows, and none spins beside workers."""
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
    except (ClientError, ConfigError, Diverged, Lost, torch.OutOfMemoryError):
        raise
    except Exception as e:
        name = type(strategy).__name__
        if isinstance(e, ValueError) and place(e, strategy) is None:
            raise ConfigError(f"{when}: {name}: {e}") from e
        raise ServerError(f"{name}.{half} failed in {when}: {type(e).__name__}: {e}") from e


class Run:
    """A run in progress, one round after the other; a context that closes its sinks.

    Args:
        experiment: what to run.
        sinks: where rows go, opened here; they need a folder.
        folder: the run's folder, for checkpoints; None keeps nothing.
        resume: go on from the newest sound checkpoint in `folder`, as far as the rows of its metrics.jsonl reach.
        watch: called with every row, for a progress line.
        callbacks: called after every round, before its row is written; a text ends the run and says why.
        started: called once when nothing can be refused any more, before anything is written.

    Attributes:
        state: the strategy's; its field `x` is the server's model.
        round: how many are done.
        last: the row of the last one.
        ended: why no round is left, None while there is one.
        best: where `checkpoint.best` was best so far.
        saved: the round of the last checkpoint, None before there is one.
        broken: whether a round broke off in its middle, after which there is nothing whole to go on from or to save.

    Raises:
        ConfigError: if the strategy found that its settings don't fit, or a checkpoint can't be read or written.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        sinks: Sequence[Sink] = (),
        folder: Path | None = None,
        resume: bool = False,
        watch: Watch = lambda row: None,
        callbacks: Sequence[Callable[[], str | None]] = (),
        started: Callable[[], None] = lambda: None,
    ) -> None:
        self.experiment, self.sinks, self.watch, self.callbacks = experiment, sinks, watch, callbacks
        self.folder = folder / "checkpoints" if folder else None
        with _threads(experiment.threads), _named(experiment.strategy, "init", "the start"):
            self.state = begin(experiment.strategy, experiment.task.init(experiment.seed).to(experiment.device))
        self.round = 0
        self.course = Course(experiment.stop)
        self.last: dict[str, Any] = {}
        self.best: Best | None = None
        self.saved: int | None = None
        self.broken = False
        self._signals: list[int] = []  # that nobody has heeded yet
        self._asked = False  # to save this round once its row is written
        self._started = time.perf_counter()  # less the seconds of the calls that this one goes on from
        if resume:
            self.restore()
        self._written = self.round  # rows so far
        self.ended = self.course.ended or self._all_done()
        started()
        with ExitStack() as stack:
            for sink in sinks:
                assert folder is not None, "sinks write to a folder"
                stack.callback(sink.close)
                with observing(f"sink {type(sink).__name__}", sink, "when it was opened"):
                    sink.open(folder, experiment.config, self.round if resume else None)
            self._open = stack.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def rounds(self) -> Generator[dict[str, Any]]:
        """The rounds that are left; their rows.

        Raises:
            Diverged, ClientError, ServerError, ConfigError: see `step`.
            Interrupted: after Ctrl-C or SIGTERM, once the running round is finished and saved.
        """
        with interruptible(self._signals):
            while self.ended is None:
                yield self.step()
                self.heed()

    def heed(self) -> None:
        """Do what a signal asked for that came while rounds were played, if one is left.

        Raises:
            Interrupted: if there was one, once the last round is saved.
        """
        if self._signals and self.ended is None:
            if self.saved != self.round:
                self.save()
            number = self._signals[0]
            self._signals.clear()
            raise Interrupted(self.round, number)

    def step(self) -> dict[str, Any]:
        """One round, and its row, which is written to the sinks; what is due is saved.

        Raises:
            ValueError: if no round is left.
            Diverged: if the model is not finite; the rows so far are written.
            ClientError, ServerError: if a half of the strategy raised.
            ConfigError: if the strategy found that its settings don't fit, or a checkpoint can't be written.

        After an error in the round itself the run has ended, and only a resume goes on.
        """
        e, number = self.experiment, self.round + 1
        if self.ended is not None:
            raise ValueError(f"round {number}: the run has ended, {self.ended}")
        try:
            with _threads(e.threads):
                row, due, reason = self._played()
        except BaseException:
            self.broken, self.ended = True, f"round {number} broke off"
            raise
        self.ended = reason or self._all_done()
        if self.ended and not e.allow_divergence and (what := self.course.exploded()):
            warnings.warn(what, stacklevel=2)
        if (metric := e.checkpoint.best) is not None:
            self.best = best_of(self.best, metric, row, self.state.x)
            if due or reason:
                check_named(metric, row)
        every = e.checkpoint.every
        asked, self._asked = self._asked, False
        if self.ended or asked or (every and self.round % every == 0):
            self.save()
        return row

    def _played(self) -> tuple[dict[str, Any], bool, str | None]:
        """A round up to its row in the sinks: (the row, whether an evaluation was due, why the run ends with it)."""
        e = self.experiment
        with room_on_gpu(f"round {self.round + 1} has", SMALLER):
            row = self._round()
            if due := self.round % e.evaluate.every == 0 or self.round == e.rounds:
                row |= self.evaluation()
            said = [self.course.take(row), *(callback() for callback in self.callbacks)]
            reason = next(filter(None, said), None)
            if reason and not due:
                row |= self.evaluation()  # the last round of a run is evaluated whatever ends it
            elif due:
                self.course.check_known()
        for sink in self.sinks:
            with observing(f"sink {type(sink).__name__}", sink, f"in round {self.round}"):
                sink.write(row)
        self._written = self.round
        self.watch(row)
        if not e.allow_divergence:
            self.check_finite(row)
        return row, due, reason

    def _all_done(self) -> str | None:
        rounds = self.experiment.rounds
        return f"all {rounds} rounds done" if self.round >= rounds else None

    def _round(self) -> dict[str, Any]:
        """The round itself, and its row without an evaluation."""
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
        self.last = row
        return row

    def _server_half(self, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
        with _named(self.experiment.strategy, "round", f"round {self.round + 1}"):
            return step(self.experiment.strategy, self.state, self.experiment.fleet, rng)

    def evaluation(self) -> dict[str, Any]:
        """Metrics of the server's model, and of clients' own."""
        e = self.experiment
        return e.evaluate.metrics(e.task, e.strategy, e.fleet, self.state.x, e.pool)

    def check_finite(self, row: Mapping[str, Any]) -> None:
        bad = [k for k, v in row.items() if isinstance(v, float) and not isfinite(v) and not without_value(row, k)]
        if not bad and not bool(torch.isfinite(torch.stack(torch.aminmax(self.state.x))).all()):
            bad = ["the model"]
        if bad:
            raise Diverged(self.round, ", ".join(bad), ", or set allow_divergence=true to go on")

    def save(self) -> None:
        """Save a checkpoint, in a callback once the round's row is written, which it needs; nothing without a folder.

        Raises:
            ConfigError: if it can't be written.
            ValueError: if a round broke off.
        """
        if self.broken:
            raise ValueError(f"{self.ended}, so there is nothing whole to save; resume from the last checkpoint")
        if self._written < self.round:
            self._asked = True
            return
        if self.folder is None:
            return
        standing = Standing(
            round=self.round,
            seconds=time.perf_counter() - self._started,
            state=self.state,
            fleet=self.experiment.fleet.state(),
            best=self.best,
        )
        save(self.folder, self.experiment, standing)
        self.saved = self.round

    def restore(self) -> None:
        """Go on from the newest sound checkpoint whose rows are all there; from the start if none was ever made."""
        assert self.folder is not None
        e = self.experiment
        found = newest(self.folder, e, self.state)
        if found is None:
            return
        e.fleet.load(found.fleet)
        self.state, self.round, self.saved, self.best = found.state, found.round, found.round, found.best
        self.course = Course(e.stop, found.rows)
        self.last = dict(found.rows[-1]) if found.rows else {}
        self._started -= found.seconds
