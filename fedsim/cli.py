"""The command line: `fedsim run`, `check`, `list`, `compare`, `sweep`, `report`, `tune`.

Exit codes: 0 success; 1 the run diverged or a half of the strategy failed; 2 a mistake in the config or the data,
with one message and no traceback; 130 Ctrl-C and 143 SIGTERM, after a checkpoint.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsim.config import ConfigError
from fedsim.overrides import parse_overrides

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", show_default=False)]


@app.callback()
def alone(context: typer.Context) -> None:
    """Federated learning on stacks of clients."""
    from fedsim.sim.torchrun import place

    command, here = context.invoked_subcommand, place()
    if here is not None and here.size > 1 and command not in ("run", "check"):
        raise ConfigError(
            f"fedsim {command}: {here.size} processes of torchrun would all do the same; call it without torchrun"
        )


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; runs/<config>-NNN if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run an experiment and leave its results in a folder.

    Ctrl-C (exit code 130) and SIGTERM (143) end the round and save; --resume goes on to the same numbers.

    CONFIG is an experiment file (YAML); OVERRIDES set keys of it: rounds=20 strategy.cohort_size=5.
    """
    from fedsim import runs
    from fedsim.shown import run_shown

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    run_shown(raw, source, out, name=config.stem, resume=resume, quiet=quiet)


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate an experiment and print its plan without running it.

    CONFIG is an experiment file (YAML); OVERRIDES set keys of it: rounds=20 strategy.cohort_size=5.
    """
    from fedsim import runs
    from fedsim.compose import compose

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    composition = compose(raw, source)
    follows = composition.executor.serve()
    composition.close()
    if not follows:
        _print_pairs(f"Plan of {config}", composition.plan)


@app.command("list")
def list_(table: Annotated[str | None, typer.Argument(help="Which table; all if left out.")] = None) -> None:
    """List what can be named in an experiment file, with one line each.

    TABLE is one of them, such as strategies or optimizers; all are shown if it is left out.
    """
    from fedsim.compose import TABLES
    from fedsim.config import did_you_mean

    if table is not None and table not in TABLES:
        raise ConfigError(f"list: unknown table {table!r}{did_you_mean(table, TABLES)}")
    for kind in [table] if table else TABLES:
        if kind == "optimizers":
            from fedsim.optim.listing import listing

            print(f"{kind}\n{listing()}\n")
            continue
        _print_pairs(kind, {name: one_line(entry) for name, entry in TABLES[kind].items()})
        print()


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[
        list[Path] | None,
        typer.Option(help="Where to write it: .html, .csv or .tex; again for several.  [default: comparison.html]"),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What to compare by; test_accuracy where all have it.")] = None,
    target: Annotated[
        float | None, typer.Option(help="Its value to count costs to; the best that all reached if left out.")
    ] = None,
) -> None:
    """Compare runs over rounds, virtual seconds and bits: one table and one HTML report.

    FOLDERS are run folders; those that differ only in their seeds count as one.
    """
    from rich.table import Column, Table

    from fedsim.history import show
    from fedsim.report import compared

    comparison = compared(folders, metric, target)
    measure = comparison.measure
    columns = {
        "final": measure,
        "best": measure,
        "rounds_to_target": "round",
        "virtual_seconds_to_target": "virtual_seconds",
        "bits_up_to_target": "bits_up",
    }
    titles = ("run", "seeds", "final", "best", "rounds", "virtual time", "sent up", "differs")
    table = Table(*(Column(title, overflow="fold") for title in titles), box=None)
    for row in comparison.rows:
        cells = ["–" if row[k] is None else show(kind, row[k]) for k, kind in columns.items()]
        differs = " ".join(f"{key}={value}" for key, value in row["differs"].items())
        table.add_row(_plain(row["name"]), str(row["num_runs"]), *cells, _plain(differs))
    _console().print(table)
    if words := comparison.in_words():
        print(f"rounds, time and bits: until {words}")
    for path in out or [Path("comparison.html")]:
        print(f"report: {comparison.write(path)}")


@app.command()
def sweep(
    config: Config,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=a,b ... key=log(1e-3,1) ... and key=value ...", show_default=False)
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Run every setting with each of these: 0,1,2.")] = None,
    search: Annotated[
        str, typer.Option(help="grid (every combination), random, or tpe (learns from results).")
    ] = "grid",
    trials: Annotated[int | None, typer.Option(help="Settings to try for each method, in a search.")] = None,
    ahead: Annotated[int, typer.Option(help="Settings that tpe tries at once; part of what it proposes.")] = 4,
    per: Annotated[str | None, typer.Option(help="Key whose values have a search and a best setting each.")] = None,
    target: Annotated[str | None, typer.Option(help="Metric to judge by; test_accuracy where runs have it.")] = None,
    minimise: Annotated[bool, typer.Option("--minimise", help="Small is good; of losses it always is.")] = False,
    jobs: Annotated[str, typer.Option(help="Trials at a time; auto is one a core, or one a GPU.")] = "auto",
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on: auto, or host:port.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs' folders; runs/<config>-sweep if left out.")
    ] = None,
) -> None:
    """Run an experiment with many settings and seeds, side by side, and show which is best.

    Call it again after Ctrl-C to complete it, or with more values or seeds to extend it.

    CONFIG is an experiment file (YAML); OVERRIDES are values to go through, "local.optimizer.lr=0.05,0.1", ranges to
    search, "local.optimizer.lr=log(1e-3,1)", and values for all runs. See docs/sweeps.md.
    """
    from fedsim.sweep import Stopped, Sweep, parse_space, play, whole_number, whole_numbers
    from fedsim.sweep.shown import Shown, show_results

    folder = out or Path("runs") / f"{config.stem}-sweep"
    plan = Sweep(
        config=config,
        space=parse_space(overrides or (), per, str(config)),
        folder=folder,
        seeds=whole_numbers("--seeds", seeds) if seeds is not None else (),
        search=search,
        trials=trials,
        ahead=ahead,
        target=target,
        minimise=minimise,
        jobs="auto" if jobs == "auto" else whole_number("--jobs", jobs),
        address=address,
    )
    with Shown(folder) as shown:
        try:
            results = play(plan, shown)
        except Stopped as e:
            _say(f"{e} with {shown.done} of {shown.total} trials done; the same command goes on")
            raise typer.Exit(e.exit_code) from e
    show_results(results)
    if troubled := results.troubled:
        for record in troubled:
            _say(f"{record.trial.folder} {record.ended.status}: {record.ended.why}")
        _say(f"{len(troubled)} of {len(results.records)} trials did not come to their end")
        raise typer.Exit(1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]) -> None:
    """Write report.html of a run again.

    FOLDER is a run folder.
    """
    from fedsim.report import write_report

    print(f"report: {write_report(folder)}")


@app.command()
def tune(config: Config, overrides: Overrides = None) -> None:
    """Measure engines and stack widths on this machine and print the keys to set.

    CONFIG is an experiment file (YAML); OVERRIDES set keys of it: clients.count=50.
    """
    from fedsim import runs
    from fedsim.tune import tune as measure

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    for line in measure(raw, source):
        print(line)


def one_line(entry: Any) -> str:
    """An entry's own description in one line: itself, its `note`, or the first line of its docstring."""
    text = entry if isinstance(entry, str) else getattr(entry, "note", None) or entry.__doc__ or ""
    return str(text).strip().split("\n")[0]


def _print_pairs(title: str, pairs: Mapping[str, str]) -> None:
    """Two columns under a title; nothing in them is taken for markup."""
    from rich.table import Table

    table = Table(title=_plain(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, value in pairs.items():
        table.add_row(_plain(key), _plain(value))
    _console().print(table)


def _plain(text: str) -> Any:
    """Text in which brackets stay brackets."""
    from rich.text import Text

    return Text(text)


def _console() -> Any:
    """A console as wide as the terminal, or 100 columns where there is none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=100)


def main() -> None:
    """The console script: mistakes become one message and an exit code."""
    warnings.showwarning = _plain_warning
    try:
        from fedsim.sim import torchrun

        if torchrun.follows():
            warnings.simplefilter("ignore")
        code, message, cause = _outcome()
    except KeyboardInterrupt:  # importing torch takes a second or two
        _say("stopped while starting; nothing was written")
        sys.exit(130)
    here = torchrun.place()
    if here is not None and message:
        torchrun.refuse(here, message)
    if torchrun.follows():
        sys.exit(0)  # the run's exit code and message are those of rank 0
    if cause is not None:
        traceback.print_exception(cause, limit=-4, file=sys.stderr)
    if message:
        _say(message)
    sys.exit(code)


def _outcome() -> tuple[int, str | None, BaseException | None]:
    """(exit code, what to say, the exception of a half of the strategy) of the command."""
    from fedsim.loop import Diverged, Interrupted, ServerError
    from fedsim.observers import ObserverError
    from fedsim.sim.executor import ClientError, Lost

    try:
        return app(standalone_mode=False) or 0, None, None  # what typer.Exit carried, or None
    except Interrupted as e:
        return e.exit_code, f"{e}; add --resume to go on", None
    except (KeyboardInterrupt, typer.Abort):
        return 130, "stopped at once; --resume goes on from the last checkpoint", None
    except Lost as e:
        return 1, f"a rank was lost ({e}); start all again, with --resume to go on from the last checkpoint", None
    except Diverged as e:
        return 1, str(e), None
    except (ClientError, ObserverError, ServerError) as e:
        return 1, str(e), e.__cause__
    except ValueError as e:
        return 2, str(e), None
    except OSError as e:
        if e.filename is None:
            raise
        return 2, f"{e.filename}: {e.strerror}; name another file or folder", None
    except Exception as e:
        if not hasattr(e, "format_message"):  # only the command line parser's own errors can format themselves
            raise
        return 2, e.format_message() or None, None  # none where the help was asked for by giving nothing


def _say(message: str) -> None:
    print(f"fedsim: {message}", file=sys.stderr)


def _plain_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    _say(f"warning: {message}")


if __name__ == "__main__":
    main()
