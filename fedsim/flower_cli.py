"""`fedsim flower`: `run` simulates a Flower app; `export`, `keys` and `deploy` make Flower apps of experiments.

Exit codes are those of `fedsim`.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from fedsim.options import OUT, Config, Overrides, Quiet

FIRST, BEYOND = (1, 39), (1, 43)  # versions of flwr, as in pyproject.toml: it may change names that are used here
MOST = 20  # devices that `deploy` starts on one machine

app = typer.Typer(no_args_is_help=True, help="Flower apps, simulated here; experiments on real devices.")


@app.callback()
def flower() -> None:
    """Flower apps, simulated here; experiments on real devices."""


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="Folder of a Flower app.", show_default=False)],
    overrides: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Devices, seed and the like (YAML).")] = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="Folder to write to; runs/<app>-NNN if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that broke off.")] = False,
    quiet: Quiet = False,
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
    check_flower()
    from fedsim.foreign import run_app
    from fedsim.progress import Progress
    from fedsim.results import last_folder

    stem = Path("runs") / folder.resolve().name
    where = out or (last_folder(stem) if resume else stem)
    history = run_app(raw, source, where, numbered=out is None and not resume, resume=resume, quiet=quiet)
    Progress(quiet).summary(history)


@app.command()
def export(
    config: Config,
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="A new folder.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Write a Flower app that runs an experiment on real devices.

    CONFIG is an experiment file (YAML); OVERRIDES set keys of it: clients.count=3. See docs/deploy.md.
    """
    check_flower()
    from fedsim.apps import export as write_app

    write_app(config, folder, tuple(overrides or ()))
    print(f"wrote {folder}; to try it on this machine: fedsim flower deploy {folder}")


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Where to write them.", show_default=False)],
    nodes: Annotated[int, typer.Option(help="How many devices.", min=1)] = 1,
    host: Annotated[list[str] | None, typer.Option(help="Name or address of the server; again for several.")] = None,
) -> None:
    """Write the certificate of a server and a key pair for every device.

    FOLDER gets what is missing there: ca.crt, server.pem and server.key, node0.key, node0.pub and so on.
    """
    check_flower()
    from fedsim.flower.credentials import DAYS, write_credentials

    write_credentials(folder, nodes, host or ())
    print(f"{folder} has keys of {nodes} device(s) and a server's certificate, which is good for {DAYS} days")


@app.command()
def deploy(
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="An exported experiment.", show_default=False)],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(*OUT, help="Folder to write to; runs/experiment-NNN if left out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    port: Annotated[
        int, typer.Option(help="Of the server; each device has one that follows.", min=1, max=65000)
    ] = 8000,
) -> None:
    """Try an exported experiment on a federation of this machine: a server, and as many devices as it has clients.

    Each command is shown as it is run, to be copied to real machines. What they need and say lies in
    APP_DIR-federation: keys, logs, the devices' memory. All processes end with the run.

    OVERRIDES set keys of the experiment: rounds=2 clients.count=3. See docs/deploy.md.
    """
    check_flower()
    from fedsim.apps import num_clients
    from fedsim.flower.deployment import deployed

    count = num_clients(folder, tuple(overrides or ()))
    if count > MOST:
        raise ValueError(
            f"{count} clients would be as many devices on this machine, each with its processes; {MOST} are the most: "
            "clients.count=2"
        )
    settings: dict[str, Any] = {"fedsim-overrides": shlex.join(overrides)} if overrides else {}
    settings |= {"fedsim-out": str(out.absolute())} if out else {}
    settings |= {"fedsim-resume": True} if resume else {}
    place = folder.resolve()  # `.` has no name
    with terminable(), deployed(place.with_name(f"{place.name}-federation"), count, port) as deployment:
        number = deployment.submit(folder, settings)
        deployment.follow(number)
        while not (state := deployment.status(number))["status"].startswith("finished"):
            time.sleep(1)
    if state["status"] != "finished:completed":
        print(f"fedsim: the run is {state['status']}: {state['status-details']}", file=sys.stderr)
        raise typer.Exit(1)


def check_flower() -> None:
    """Refuse to go on without Flower, or with a version of it that nobody tried.

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
            f"flwr {found} is installed, and fedsim was tried with {a}.{b} to {c}.{d - 1}; install one of these"
        )


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM is an exception, so that whatever was started is ended."""

    def end(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
