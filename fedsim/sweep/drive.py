"""Running a sweep: who comes next, on which worker, and what is kept."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fedsim import runs
from fedsim.config import ConfigError
from fedsim.data.sources import kept
from fedsim.files import held
from fedsim.metrics import small_is_good
from fedsim.sweep.machine import Machine
from fedsim.sweep.plan import Sweep
from fedsim.sweep.results import Record, Results, folded, target_of
from fedsim.sweep.search import Listed, Search, Tpe, random_settings
from fedsim.sweep.space import Method, Setting
from fedsim.sweep.trials import Ended, Job, Trial
from fedsim.sweep.workers import Word, Workers


class Stopped(Exception):
    """A signal ended a sweep; its trials are saved and the same call goes on."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Watch:
    """Is told how a sweep goes; this one says nothing."""

    def plan(self, trials: int, words: str) -> None:
        """So many trials are to come, in such a way."""

    def started(self, trial: Trial) -> None:
        """A trial was given to a worker."""

    def row(self, trial: Trial, round: int) -> None:
        """A trial has done so many rounds."""

    def warning(self, text: str) -> None:
        """A run warns."""

    def ended(self, record: Record, target: str | None, before: bool) -> None:
        """A trial has ended, in an earlier call if `before`."""

    def stopping(self) -> None:
        """A signal came: running trials finish their round and save."""


def play(sweep: Sweep, watch: Watch | None = None) -> Results:
    """Run what was not run before, and write down what came out.

    Args:
        sweep: what to run.
        watch: is told how it goes.

    Returns:
        The results; trials that diverged or failed are among them.

    Raises:
        ConfigError: for a mistake in the file or the space, before anything runs; for a target that runs don't have.
        Stopped: after a signal, once running trials have saved.
    """
    with kept(), _stoppable():
        return _Driver(sweep, watch or Watch()).run()


class _Driver:
    """A sweep in progress."""

    def __init__(self, sweep: Sweep, watch: Watch) -> None:
        self.sweep, self.watch, self.target, self.stopping = sweep, watch, sweep.target, False
        self.methods = sweep.space.methods()
        self.machine = Machine.of(sweep)
        key = runs.load(sweep.config, {})[0].get("seed", 0)
        self.searches = {method.name: self._search(method, key) for method in self.methods}
        self.jobs: dict[Path, Job] = {}  # that are checked and wait for a worker
        self.order: dict[Path, Trial] = {}  # as proposed
        self.ended: dict[Path, Record] = {}
        self.waiting: deque[Trial] = deque()
        self.running: dict[Path, Trial] = {}

    def run(self) -> Results:
        sweep = self.sweep
        workers = self.machine.workers()
        try:
            settings = [setting for search in self.searches.values() for setting in search.known()]
            for trial in [trial for setting in settings for trial in self._trials(setting)]:
                trial.claim()
                self.jobs[trial.folder] = self.machine.job(trial)
            count = len(settings) if sweep.search != "tpe" else (sweep.trials or 0) * len(self.methods)
            try:
                sweep.folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise ConfigError(f"{sweep.folder}: can't write here: {e}; choose another --out") from e
            with held(sweep.folder):
                self.watch.plan(count * max(1, len(sweep.seeds)), workers.words)
                try:
                    self._play(workers)
                finally:
                    results = self._results()
                    results.write()
        finally:
            workers.close()
        return results

    def _play(self, workers: Workers) -> None:
        try:
            self._fill(workers)
            while self.running:
                for word in workers.wait():
                    self._hear(word)
                self._fill(workers)
        except Stopped:
            self.stopping = True
            self.watch.stopping()
            for word in workers.stop():
                self._hear(word)
            raise

    def _fill(self, workers: Workers) -> None:
        """Give every free worker a trial."""
        while workers.free and (trial := self._next()) is not None:
            if (before := trial.before()) is not None:
                self._end(trial, before, before=True)
                continue
            try:
                trial.claim()
                job = self.jobs.pop(trial.folder, None) or self.machine.job(trial)
            except ConfigError as e:  # of a proposal that came after the check of all that was known
                self._end(trial, Ended("failed", str(e)))
                continue
            trial.begin()
            self.running[trial.folder] = trial
            self.watch.started(trial)
            workers.start(job)

    def _next(self) -> Trial | None:
        """The next trial; None if there is none before more have ended."""
        while not self.waiting:
            setting = next((s for search in self.searches.values() if (s := search.next()) is not None), None)
            if setting is None:
                return None
            new = [trial for trial in self._trials(setting) if trial.folder not in self.order]
            self.order |= {trial.folder: trial for trial in new}
            self.waiting.extend(new)  # none where a search proposes what it has proposed before
        return self.waiting.popleft()

    def _trials(self, setting: Setting) -> list[Trial]:
        """One for each seed."""
        trials = []
        for seed in self.sweep.seeds or (None,):
            own = {} if seed is None else {"seed": seed}
            raw, source = runs.load(self.sweep.config, {**setting.overrides, **own})
            name = ",".join([part for part in (setting.name, "" if seed is None else f"seed={seed}") if part])
            trials.append(Trial(setting, seed, raw, source, self.sweep.folder / name))
        return trials

    def _hear(self, word: Word) -> None:
        trial = self.running[word.job.folder]
        if word.warning:
            self.watch.warning(f"{trial.folder.name}: {word.warning}")
        elif word.ended is None:
            self.watch.row(trial, word.round)
        else:
            del self.running[trial.folder]
            if word.ended.status == "stopped":
                if word.ended.code and not self.stopping:
                    raise Stopped(word.ended.code - 128)
                return
            trial.note(word.ended)
            self._end(trial, word.ended)

    def _end(self, trial: Trial, ended: Ended, before: bool = False) -> None:
        record = Record(trial, ended, trial.final() if ended.status == "done" else {})
        if ended.status == "done":
            self.target = target_of(record, self.target)
        self.ended[trial.folder] = record
        self.watch.ended(record, self.target, before)
        setting = trial.setting
        records = [self.ended.get(t.folder) for t in self.order.values() if t.setting.name == setting.name]
        if None not in records:
            value = None if self.target is None else folded([r for r in records if r is not None], self.target)
            self.searches[setting.method].tell(setting, value if value is None or self.minimises else -value)

    def _search(self, method: Method, key: int) -> Search:
        sweep, count = self.sweep, self.sweep.trials or 0
        if sweep.search == "tpe":
            return Tpe(method, count, key, ahead=sweep.ahead)
        return random_settings(method, count, key) if sweep.search == "random" else Listed(method.grid())

    def _results(self) -> Results:
        records = [self.ended[folder] for folder in self.order if folder in self.ended]
        count = max(1, len(self.sweep.seeds))
        return Results(self.sweep.folder, self.methods, records, self.target, self.minimises, count)

    @property
    def minimises(self) -> bool:
        """Whether small values of the target are good: where the user says so, and where its name does."""
        return self.sweep.minimise or (self.target is not None and small_is_good(self.target))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGINT (Ctrl-C) and SIGTERM raise Stopped, a second one KeyboardInterrupt."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise Stopped(number) if len(asked) == 1 else KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
