"""The command line: `fedsim run`, `init`, `check`, `list`, `compare`, `sweep`, `report`, `tune`, `flower`.

Commands import what they need: help and version come without torch.

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

from fedsim import __version__, flower_cli
from fedsim.options import OUT, Config, Overrides, Quiet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(flower_cli.app, name="flower")


def _version(asked: bool) -> None:
    if asked:
        print(f"fedsim {__version__}")
        raise typer.Exit


@app.callback()
def alone(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Federated learning on stacks of clients."""
    from fedsim.sim.place import place

    command, here = context.invoked_subcommand, place()
    if here is not None and here.size > 1 and command not in ("run", "check"):
        raise ValueError(
            f"fedsim {command}: {here.size} processes of torchrun would all do the same; call it without torchrun"
        )


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="Folder to write to; runs/<config>-NNN if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment and leave its results in a folder.

    Ctrl-C (exit code 130) and SIGTERM (143) end the round and save; --resume goes on to the same numbers.

    CONFIG is an experiment file (YAML); OVERRIDES set keys of it: rounds=20 strategy.cohort_size=5.
    """
    from fedsim import runs
    from fedsim.overrides import parse_overrides
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
    from fedsim.overrides import parse_overrides

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    composition = compose(raw, source)
    follows = composition.executor.serve()
    composition.close()
    if not follows:
        _print_pairs(f"Plan of {config}", composition.plan)


@app.command()
def init(
    strategy: Annotated[str, typer.Option(help="A name of `fedsim list strategies`, or an import path.")] = "fedavg",
    dataset: Annotated[str, typer.Option(help="A name of `fedsim list datasets`, or an import path.")] = "digits",
    out: Annotated[Path, typer.Option(*OUT, help="File to write.")] = Path("experiment.yaml"),
) -> None:
    """Write a first experiment file, with every key that it may have and what each means."""
    from fedsim.compose.starter import starter
    from fedsim.files import write_whole

    if out.exists():
        raise ValueError(f"{out} is already there; give another --out or remove it")
    write_whole(out, starter(strategy, dataset))
    print(f"wrote {out}; look at it, then: fedsim check {out}, fedsim run {out}")


@app.command("list")
def list_(
    table: Annotated[str | None, typer.Argument(help="Which table; all if left out.")] = None,
    entry: Annotated[str | None, typer.Argument(help="One of its entries, to show its keys.")] = None,
) -> None:
    """List what can be named in an experiment file, with one line each, or every key of one entry.

    TABLE is one of them, such as strategies or optimizers; all are shown if it is left out. ENTRY is a name in it:
    fedsim list strategies fedfix.
    """
    from fedsim.compose import TABLES
    from fedsim.config import did_you_mean

    if table is not None and table not in TABLES:
        homes = "; or ".join(f"fedsim list {home} {table}" for home, entries in TABLES.items() if table in entries)
        raise ValueError(f"list: unknown table {table!r}{f'; try {homes}' if homes else did_you_mean(table, TABLES)}")
    if table is not None and entry is not None:
        _show_entry(table, entry)
        return
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
        typer.Option(*OUT, help="Where to write it: .html, .csv or .tex; again for several; else comparison.html."),
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
        print(f"wrote {comparison.write(path)}")


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
        Path | None, typer.Option(*OUT, help="Folder of the runs' folders; runs/<config>-sweep if left out.")
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
    from fedsim.overrides import parse_overrides
    from fedsim.tune import tune as measure

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    for line in measure(raw, source):
        print(line)


def one_line(entry: Any) -> str:
    """An entry's own description in one line: itself, its `note`, or the first line of its docstring."""
    text = entry if isinstance(entry, str) else getattr(entry, "note", None) or entry.__doc__ or ""
    return str(text).strip().split("\n")[0]


def _show_entry(table: str, entry: str) -> None:
    """What an entry is, where it stands in a file, and its keys with their defaults, types and meanings."""
    from rich.table import Table

    from fedsim.compose.keys import NEEDED, PLACES, keys_of_entry, paragraph

    keys = keys_of_entry(table, entry)
    print(f"{paragraph(table, entry)}\n")
    if table in PLACES:
        needed = "".join(f", {key.name}: ..." for key in keys if key.default is NEEDED)
        print(f"{PLACES[table][1]}: {{name: {entry}{needed}}}\n")
    if not keys:
        print("no keys")
        return
    shown = Table(box=None, pad_edge=False)
    for title, width in (("key", 22), ("default", 16), ("type", 20), ("meaning", None)):
        shown.add_column(title, overflow="fold", max_width=width)
    for key in keys:
        shown.add_row(*map(_plain, (key.name, key.default_text, key.type, key.meaning)))
    _console().print(shown)


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
    from fedsim.sim.place import follows, place

    warnings.showwarning = _plain_warning
    if follows():
        warnings.simplefilter("ignore")
    code, message, cause = _outcome()
    if message and (here := place()) is not None:
        from fedsim.sim.torchrun import refuse

        refuse(here, message)
    if follows():
        sys.exit(0)  # the run's exit code and message are those of rank 0
    if cause is not None:
        traceback.print_exception(cause, limit=-4, file=sys.stderr)
    if message:
        _say(message)
    sys.exit(code)


def _outcome() -> tuple[int, str | None, BaseException | None]:
    """(exit code, what to say, the exception of a half of the strategy) of the command."""
    try:
        code = app(standalone_mode=False) or 0  # what typer.Exit carried, or None; 130 for Ctrl-C
        early = code == 130 and "fedsim.runs" not in sys.modules  # importing torch takes a second or two
        return code, "stopped while starting; nothing was written" if early else None, None
    except (KeyboardInterrupt, typer.Abort):
        return 130, "stopped at once; --resume goes on from the last checkpoint", None
    except Exception as e:
        if hasattr(e, "format_message"):  # only the command line parser's own errors can format themselves
            said = e.format_message()  # nothing where the help was asked for by giving nothing
            return 2, f"{said} {_way_out(e)}" if said else None, None
        if isinstance(e, ValueError):
            return 2, str(e), None
        if isinstance(e, OSError) and e.filename is not None:
            return 2, f"{e.filename}: {e.strerror}; name another file or folder", None
        return _end_of_run(e)


def _way_out(e: Any) -> str:
    """What helps after an error of the command line parser."""
    no_such_option = hasattr(e, "option_name") and hasattr(e, "possibilities")
    keys = "Keys of the file are set without dashes: rounds=20. " if no_such_option else ""
    context = getattr(e, "ctx", None)
    return f"{keys}{context.command_path if context else 'fedsim'} --help says what there is."


def _end_of_run(e: Exception) -> tuple[int, str, BaseException | None]:
    """The same of an exception that says how a run ended; any other is raised again."""
    from fedsim.loop import Interrupted, ServerError
    from fedsim.observers import ObserverError
    from fedsim.sim.executor import ClientError, Lost
    from fedsim.stop import Diverged

    if isinstance(e, Interrupted):
        return e.exit_code, f"{e}; add --resume to go on", None
    if isinstance(e, Lost):
        return 1, f"the run has lost what it needs: {e}; start again, with --resume from what was saved", None
    if isinstance(e, Diverged):
        return 1, str(e), None
    if isinstance(e, ClientError | ObserverError | ServerError):
        return 1, str(e), e.__cause__
    raise e


def _say(message: str) -> None:
    print(f"fedsim: {message}", file=sys.stderr)


def _plain_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    _say(f"warning: {message}")


if __name__ == "__main__":
    main()
