"""`fedsim flower run`: a Flower app, simulated here. Exit codes are those of `fedsim`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

FIRST, BEYOND = (1, 39), (1, 43)  # versions of flwr, as in pyproject.toml: apps are run by names that it may change

app = typer.Typer(no_args_is_help=True, help="Flower apps, simulated here.")


@app.callback()
def flower() -> None:
    """Flower apps, simulated here."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="Folder of a Flower app.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Devices, seed and the like (YAML).")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to; runs/<app>-NNN if left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that broke off.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run an unmodified Flower app on virtual devices, reproducibly.

    APP_DIR holds the app's pyproject.toml. OVERRIDES set keys of CONFIG: seed=1 clients.count=100
    clients.devices=lognormal; those of the app itself stand under run_config: run_config.num-server-rounds=5.
    See docs/flower-apps.md.
    """
    from fedsim.overrides import apply_overrides, parse_overrides, read_file

    source = str(config or folder)
    keys = {"app": str(folder), **parse_overrides(overrides or (), source)}
    raw = apply_overrides({}, keys, source) if config is None else read_file(config, keys)
    _check_flower()
    from fedsim.foreign import run_app
    from fedsim.progress import Progress
    from fedsim.results import last_folder

    stem = Path("runs") / folder.resolve().name
    where = out or (last_folder(stem) if resume else stem)
    history = run_app(raw, source, where, numbered=out is None and not resume, resume=resume, quiet=quiet)
    Progress(quiet).summary(history)


def _check_flower() -> None:
    """Refuse to run apps without Flower, or with a version of it that nobody tried.

    Raises:
        ValueError: if so.
    """
    try:
        found = version("flwr")
    except PackageNotFoundError as e:
        raise ValueError("Flower is not installed; run pip install 'fedsim-stacks[flower]'") from e
    if not FIRST <= tuple(map(int, found.split(".")[:2])) < BEYOND:
        (a, b), (c, d) = FIRST, BEYOND
        raise ValueError(
            f"flwr {found} is installed, and its apps run here with {a}.{b} to {c}.{d - 1}; install another"
        )
