"""Running an experiment: whole (`run`), or round by round (`simulate`), into a folder or not."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn

from fedsim.compose import Composition, compose, shared_fields
from fedsim.compose.objects import as_overrides, completed
from fedsim.config import ConfigError, naming
from fedsim.fleet import DrivenFleet
from fedsim.history import NO_MODULE, History
from fedsim.loop import Run, Watch
from fedsim.observers import observing
from fedsim.overrides import apply_overrides, read_file
from fedsim.params import trained
from fedsim.progress import Progress
from fedsim.results import (
    SUMMARY_FILE,
    as_it_began,
    check_folder,
    claimed,
    holds_run,
    write_best,
    write_inputs,
    write_results,
)
from fedsim.sim.place import follows, place

BY_HAND = "left before its end"  # why a run that was stepped through is over

Callback = Callable[["Simulation"], str | None]
Started = Callable[[Composition, Path | None], None]


def run(
    config: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    model: Any = None,
    data: Any = None,
    strategy: Any = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | None = None,
    **overrides: Any,
) -> History:
    """Run an experiment and return its history.

    Args:
        config: a file, or its content as nested mappings, in which a function or class may stand for its name.
        out: folder to write to; None writes nothing.
        resume: go on from the newest checkpoint in `out`.
        model: a module, whose parameters are where training starts, or a function or class that makes one, called
            with those of `input_shape`, `num_classes` and the fields of `task.model` that it has parameters for. An
            object given here, as those of the next two, replaces the file's own entry.
        data: a `Dataset`, a `FederatedData`, arrays (x, y), (x, y, clients) or (x, y, x_test, y_test), or a function
            that returns one of these; a mapping is the section `data` of the file.
        strategy: a strategy, or a class (or `functools.partial` of one) whose fields the section `strategy` sets; a
            name or a mapping is that section.
        callbacks: called after every round with the simulation; a text that one returns ends the run and says why.
        progress: whether to show how it goes; by default in a notebook alone.
        overrides: top-level keys (`rounds=5`), or dotted ones as `**{"local.optimizer.lr": 0.1}`.

    Raises:
        ConfigError: for a mistake in the file or the data.
        fedsim.stop.Diverged: if the model is not finite any more.
        fedsim.observers.ObserverError: if a callback raised.
    """
    raw, source = _content(config, overrides, {"model": model, "data": data, "strategy": strategy})
    folder = _folder(out, resume)
    with Progress(True if follows() else None if progress is None else not progress) as shown:
        return execute(raw, source, folder, resume=resume, callbacks=callbacks, watch=shown.watch, started=shown.start)


def simulate(
    config: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    model: Any = None,
    data: Any = None,
    strategy: Any = None,
    callbacks: Sequence[Callback] = (),
    **overrides: Any,
) -> Simulation:
    """The same run, to step through by hand: ready, with no round done yet. Arguments and errors are those of `run`."""
    raw, source = _content(config, overrides, {"model": model, "data": data, "strategy": strategy})
    return Simulation(raw, source, _folder(out, resume), resume=resume, callbacks=callbacks)


def _content(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """(the file's content with all that is to be different there, its name for messages)."""
    sections = {k: v for k, v in given.items() if k != "model" and isinstance(v, str | Mapping)}  # and no objects
    objects = {k: v for k, v in given.items() if k not in sections}
    with naming(_named(config)):
        entries = as_overrides(**objects)
    raw, source = load(config, {**overrides, **sections, **entries})
    objects.pop("strategy", None)
    return completed(raw, **objects), source


def _folder(out: str | Path | None, resume: bool) -> Path | None:
    if resume and out is None:
        raise ConfigError("resume=True needs out=, the folder of the run to go on with")
    return None if out is None else Path(out)


def load(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(content after overrides, name for messages) of a config given as a file or as mappings."""
    if isinstance(config, Mapping):
        return apply_overrides(config, overrides, _named(config), shared_fields), _named(config)
    return read_file(config, overrides, shared_fields), _named(config)


def _named(config: str | Path | Mapping[str, Any]) -> str:
    """Of a config, for messages."""
    return "config" if isinstance(config, Mapping) else str(config)


def execute(raw: Mapping[str, Any], source: str, folder: Path | None, **options: Any) -> History:
    """Compose and run to the end; see `Simulation`.

    Returns:
        The rows; none on a rank of a torchrun but the first, which alone writes and prints.
    """
    with Simulation(raw, source, folder, **options) as simulation:
        return simulation.finish()


class Simulation:
    """A run in progress, made by `fedsim.simulate`: a context that stops its workers and completes its folder.

        with fedsim.simulate("configs/quickstart.yaml", rounds=20) as simulation:
            for metrics in simulation.rounds():
                print(metrics["round"], metrics["train_loss"])

    Args:
        raw: the file's content after overrides; objects stand in it as `fedsim.compose.objects` puts them.
        source: the file's name, for messages.
        folder: the run's folder, or None.
        numbered: take the first free of `folder`-001, `folder`-002, ... instead.
        resume: go on from the folder's newest checkpoint.
        callbacks: see `run`.
        watch: called with every row.
        started: called with the composition and the folder just before the first round.
        fleet: makes the fleet to run on from the composition, before anything is written; None keeps the simulated one.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        source: str,
        folder: Path | None,
        *,
        numbered: bool = False,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        watch: Watch = lambda row: None,
        started: Started = lambda composition, folder: None,
        fleet: Callable[[Composition], DrivenFleet] | None = None,
    ) -> None:
        if resume and folder is not None:
            raw = as_it_began(raw, folder)
        if follows():
            folder, fleet = None, None
        if folder is not None and not numbered:
            check_folder(folder, resume)
        self._rows: list[dict[str, Any]] = []  # without a folder, which holds them otherwise
        with ExitStack() as stack:
            self._made = made = compose(raw, source)
            stack.callback(made.close)
            if fleet is not None:
                made.experiment.fleet = fleet(made)
            self._folder = folder
            with self._writing():
                if folder is not None:
                    self._folder = stack.enter_context(claimed(folder, numbered))
                    check_folder(self._folder, resume)  # again, now that nobody else writes there
                self._run = stack.enter_context(self._begin(resume, callbacks, watch, started))
                if self._folder is not None and self._run.best is not None:
                    write_best(self._folder, made, self._run.best)  # that of the checkpoint
            self._stack: ExitStack | None = stack.pop_all()

    def _begin(self, resume: bool, callbacks: Sequence[Callback], watch: Watch, started: Started) -> Run:
        made, folder = self._made, self._folder
        if folder is not None and made.resolved["runtime"]["memory"] == "disk":
            made.memory.folder = folder / "memory"

        def start() -> None:
            if folder is not None:
                write_inputs(folder, made)
            started(made, folder)

        return Run(
            made.experiment,
            sinks=() if folder is None else made.sinks,
            folder=folder,
            resume=resume and folder is not None,  # of the ranks of a torchrun only the first has it
            watch=watch,
            callbacks=[partial(self._told, callback) for callback in callbacks],
            started=start,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._close(complete=kind is None)

    @property
    def state(self) -> Any:
        """The strategy's state; its field `x` is the server's model as one vector [P]."""
        return self._run.state

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The row of the last round."""
        return self._run.last

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self._run.round

    @property
    def ended(self) -> str | None:
        """Why no round is left; None while there is one."""
        return self._run.ended

    @property
    def model(self) -> nn.Module:
        """A copy of the module with the server's present parameters, in evaluation mode.

        Raises:
            ValueError: if the task has no module.
        """
        if self._made.samples is None:
            raise ValueError(f"{NO_MODULE}; simulation.state.x holds the server's vector")
        return trained(self._made.samples.module, self.state.x)

    @property
    def history(self) -> History:
        """The rows so far, with their models."""
        run, folder, samples = self._run, self._folder, self._made.samples
        models = {}
        if samples is not None:
            models["model"] = partial(trained, samples.module, run.state.x)
        if samples is not None and run.best is not None and run.best.x is not None:
            models["best_model"] = partial(trained, samples.module, run.best.x)
        if folder is None:
            return History(list(self._rows), dict(self._made.resolved), None, models)
        return replace(History.load(folder), models=models)

    def rounds(self) -> Generator[dict[str, Any]]:
        """Play the rounds that are left, each when its row is asked for.

        Raises:
            ConfigError, Diverged, ClientError, ServerError, ObserverError: see `run` and `fedsim.loop.Run.step`.
            Interrupted: after Ctrl-C or SIGTERM, once the running round is finished and saved; where the loop is left
                in that round, when the simulation is closed.
        """
        if self._made.executor.serve():
            return
        rounds = self._run.rounds()
        try:
            while True:
                with self._writing():
                    if (row := next(rounds, None)) is None:
                        return
                    self._note(row)
                yield row
        finally:
            rounds.close()

    def step(self) -> dict[str, Any]:
        """Play one round; its row.

        Raises:
            ValueError: if no round is left, or several ranks of a torchrun would have to; for the others see `rounds`.
        """
        if (here := place()) is not None and here.size > 1:
            raise ConfigError("under torchrun all ranks play the rounds together; call rounds() or finish()")
        with self._writing():
            row = self._run.step()
            self._note(row)
        return row

    def finish(self) -> History:
        """Play the rounds that are left and close; what the run was."""
        for _ in self.rounds():
            pass
        self.close()
        with self._writing():
            return self.history

    def save(self) -> None:
        """Save a checkpoint to resume from, in a callback right after the round's row; nothing without a folder."""
        with self._writing():
            self._run.save()

    def close(self) -> None:
        """Complete the folder (checkpoint, model, summary, report) unless a round broke off, and stop the workers."""
        self._close(complete=True)

    def _close(self, complete: bool) -> None:
        stack, self._stack = self._stack, None
        if stack is None:
            return
        with self._writing(), stack:
            folder, run = self._folder, self._run
            if complete and folder is not None and run.round and not run.broken:
                if run.saved != run.round:
                    run.save()
                write_results(folder, self._made, run.state.x, History.load(folder), run.ended or BY_HAND)
            if complete:
                run.heed()  # a signal that came before the caller left the loop over the rounds

    def _note(self, row: dict[str, Any]) -> None:
        """What is kept of a round beside its row in the folder."""
        if self._folder is None:
            self._rows.append(row)
            return
        (self._folder / SUMMARY_FILE).unlink(missing_ok=True)  # of fewer rounds, and no longer all that is there
        if (best := self._run.best) is not None and best.round == row["round"]:
            write_best(self._folder, self._made, best)

    def _told(self, callback: Callback) -> str | None:
        """What a callback says to the last round."""
        name = getattr(callback, "__qualname__", type(callback).__name__)
        with observing(f"callback {name}", callback, f"in round {self.round}"):
            said = callback(self)
            if said is not None and not isinstance(said, str):
                raise TypeError(f"it returned {said!r}; return None, or why the run is to end, as text")
        return said

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A disk that is full or gone, in one line."""
        try:
            yield
        except OSError as e:
            if self._folder is None:
                raise
            way_out = "then add --resume to go on" if holds_run(self._folder) else "or choose another --out"
            raise ConfigError(f"{self._folder}: can't write here: {e}; make room, {way_out}") from e
