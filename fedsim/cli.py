"""The command line: `fedsim run`, `check`, `list`, `compare`, `report`, `tune`.

Exit codes: 0 success; 1 the run diverged or a client half failed; 2 a mistake in the config or the data, with one
message and no traceback; 130 Ctrl-C, after a checkpoint.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsim.config import ConfigError, parse_overrides

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated learning on stacks of clients.",
)

Config = Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", show_default=False)]


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to [default: runs/<config>-NNN].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run an experiment and leave its results in a folder."""
    from fedsim import runs
    from fedsim.progress import Progress

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    folder = out or (runs.last_folder(config) if resume else runs.next_folder(config))
    with Progress(quiet) as progress:
        history = runs.execute(
            raw, source, folder, resume=resume, watch=progress.watch, started=lambda c: progress.start(c, folder)
        )
    progress.summary(history, folder)


@app.command()
def check(config: Config, overrides: Overrides = None) -> None:
    """Validate an experiment and print its plan without running it."""
    from rich.console import Console
    from rich.table import Table

    from fedsim import runs
    from fedsim.compose import compose

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    composition = compose(raw, source)
    composition.close()
    table = Table(title=f"Plan of {config}", show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for key, value in composition.plan.items():
        table.add_row(key, value)
    Console().print(table)


@app.command("list")
def list_(table: Annotated[str | None, typer.Argument(help="Which table; all if left out.")] = None) -> None:
    """List what can be named in an experiment file, with one line each."""
    from rich.console import Console
    from rich.table import Table

    from fedsim.compose import TABLES
    from fedsim.config import did_you_mean

    if table is not None and table not in TABLES:
        raise ConfigError(f"fedsim list: unknown table {table!r}{did_you_mean(table, TABLES)}")
    for kind in [table] if table else TABLES:
        shown = Table(title=kind, title_justify="left", show_header=False, box=None, pad_edge=False)
        shown.add_column(style="bold", no_wrap=True)
        shown.add_column()
        for name, entry in TABLES[kind].items():
            shown.add_row(name, one_line(entry))
        Console().print(shown, "")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path("comparison.html"),
) -> None:
    """Compare runs over rounds, virtual seconds and bits: one table and one HTML report."""
    from rich.console import Console
    from rich.table import Table

    from fedsim.report import comparison_table, write_comparison

    rows = comparison_table(folders)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    shown = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*(_cell(row.get(c)) for c in columns))
    Console().print(shown)
    print(f"report: {write_comparison(folders, out)}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]) -> None:
    """Write report.html of a run again."""
    from fedsim.report import write_report

    print(f"report: {write_report(folder)}")


@app.command()
def tune(config: Config, overrides: Overrides = None) -> None:
    """Measure engines and stack widths on this machine and print the keys to set."""
    from fedsim import runs
    from fedsim.tune import tune as measure

    raw, source = runs.load(config, parse_overrides(overrides or (), str(config)))
    for line in measure(raw, source):
        print(line)


def one_line(entry: Any) -> str:
    """The first line of an entry's own description."""
    if isinstance(entry, str):
        return entry
    line = getattr(entry, "line", None)
    text = line if isinstance(line, str) else (entry.__doc__ or "")
    return text.strip().split("\n")[0]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> None:
    """The console script: mistakes become one message and an exit code."""
    from fedsim.loop import Diverged, Interrupted
    from fedsim.sim.executor import ClientError

    warnings.showwarning = _plain_warning
    try:
        app(standalone_mode=False)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except Interrupted as e:
        _say(f"{e}; add --resume to go on")
        sys.exit(130)
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped at once; --resume goes on from the last checkpoint")
        sys.exit(130)
    except Diverged as e:
        _say(str(e))
        sys.exit(1)
    except ClientError as e:
        traceback.print_exception(e.__cause__, limit=-4, file=sys.stderr)
        _say(str(e))
        sys.exit(1)
    except ValueError as e:
        _say(str(e))
        sys.exit(2)
    except Exception as e:
        if not hasattr(e, "format_message"):  # only the command line parser's own errors can format themselves
            raise
        _say(e.format_message())
        sys.exit(2)


def _say(message: str) -> None:
    print(f"fedsim: {message}", file=sys.stderr)


def _plain_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    _say(f"warning: {message}")


if __name__ == "__main__":
    main()
