"""The other composition root: an experiment file becomes Flower's ServerApp and ClientApp.

Both ends build everything from the same file: the server the strategy, its model and what it evaluates on; a client its
task, its strategy's client halves and the uplink. `fedsim.apps:server` and `fedsim.apps:client` can be named in an
app's pyproject; they find the file through the run's settings. docs/deploy.md shows a whole deployment.

Settings of a run (`flwr run -c "..."`): `fedsim-config`, a path or the file's text; `fedsim-overrides`, as after
`fedsim run`; `fedsim-out`, the run's folder at the server; `fedsim-resume`; `fedsim-reply-seconds`, how long to wait
for nodes and replies; `fedsim-max-examples`, how many samples a device may say it has. Settings of a node
(`--node-config`): `partition-id`, which client it is; `fedsim-overrides`, what is different there
(`data.root=/srv/mine runtime.device=cuda:1`); `fedsim-memory`, a folder of its own for this experiment, in which the
client keeps what it remembers, for a SuperNode that is started again or a run that is resumed.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim import runs
from fedsim.clients import flower_app
from fedsim.compose import Composition, compose, shared_fields
from fedsim.config import ConfigError
from fedsim.experiment import Experiment
from fedsim.flower.client import Answer, app_of
from fedsim.flower.clock import WALL, Clock, Patience
from fedsim.flower.door import MAX_EXAMPLES, Door
from fedsim.flower.export import EXPERIMENT, write_app
from fedsim.flower.fleet import FlowerFleet
from fedsim.flower.mail import Mail
from fedsim.flower.nodes import connect
from fedsim.flower.wire import Book
from fedsim.overrides import apply_overrides, parse_overrides
from fedsim.results import versions
from fedsim.shown import run_shown
from fedsim.sim.executor import StackRunner
from fedsim.sim.fleet import SimFleet
from fedsim.sim.in_process import InProcess

Source = str | Path | Mapping[str, Any]
"""An experiment: a file, its text, or its content."""

DEPLOYED = {"runtime.executor": "in_process", "runtime.address": None, "runtime.stack": 1}
ON_CLIENT = {**DEPLOYED, "runtime.workers": 1, "runtime.memory": "ram", "log.sinks": ["jsonl"]}


def server_app(config: Source | None = None) -> ServerApp:
    """The app that a SuperLink runs; without an experiment it takes the one of the run's settings."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, config, context.run_config)

    return app


def client_app(config: Source | None = None) -> ClientApp:
    """The app that every SuperNode runs; without an experiment it takes the one of the run's settings."""
    return app_of(answer_of(config))


def answer_of(config: Source | None = None) -> Answer:
    """What answers the messages to a device."""

    def build(context: Context) -> tuple[StackRunner, Book, Mapping[str, str]]:
        raw, source = experiment_of(config, context.run_config, context.node_config)
        return _client(json.dumps(raw), source)

    return partial(flower_app.answer, build)


def serve(grid: Grid, config: Source | None, settings: Mapping[str, Any], clock: Clock = WALL) -> runs.History:
    """Run an experiment on a grid, into a run folder.

    Args:
        grid: Flower's, or a local one.
        config: the experiment; None takes it from the settings.
        settings: of the run; see the module's head.
        clock: where seconds come from.

    Raises:
        ConfigError: for a mistake in the file or the settings.
        ClientError: if a client is missing or fails.
    """
    raw, source = experiment_of(config, settings)
    out, patience, most = settings.get("fedsim-out"), _patience(settings), _max_examples(settings)
    return run_shown(
        apply_overrides(raw, DEPLOYED, source),
        source,
        Path(out).absolute() if out else None,
        name=Path(source).stem if source.endswith(".yaml") else "flower",
        resume=bool(settings.get("fedsim-resume", False)),
        fleet=lambda composition: deploy(composition, grid, patience, clock, most),
    )


def deploy(
    composition: Composition,
    grid: Grid,
    patience: Patience,
    clock: Clock = WALL,
    max_examples: int = MAX_EXAMPLES,
) -> FlowerFleet:
    """The fleet of real clients for a composed experiment, once all of them are there.

    Raises:
        ConfigError: if the experiment asks for what only a simulation has.
        ClientError: if clients are missing.
    """
    experiment, simulated, executor = composition.experiment, composition.experiment.fleet, composition.executor
    assert isinstance(simulated, SimFleet) and isinstance(executor, InProcess)
    _refuse_attacks(composition)
    count = len(experiment.task.num_examples)
    composition.plan["workers"] = f"{count} Flower nodes on the wall clock (clients.devices is for simulations)"
    door = Door(
        book=_book(executor.runner, simulated),
        seed=experiment.seed,
        model_size=experiment.strategy.sent(experiment.task.layout).size,
        max_examples=max_examples,
        agreed=_agreed(experiment),
    )
    nodes = connect(grid, count, door, clock, patience)
    mail = Mail(grid, nodes, door, clock, patience, experiment.device)
    return FlowerFleet(
        mail,
        seed=door.seed,
        model_size=door.model_size,
        downlink=simulated.downlink,
        needs_all=experiment.strategy.traits.needs_all,
    )


def experiment_of(
    config: Source | None, settings: Mapping[str, Any], node: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """(content with all overrides, name for messages) of a run's experiment.

    Raises:
        ConfigError: if there is none, or it can't be read.
    """
    config = settings.get("fedsim-config") or config
    if not config:
        raise ConfigError("no experiment: give its path or text, flwr run -c \"fedsim-config='...'\"")
    texts = [text for place in (settings, node or {}) for text in shlex.split(str(place.get("fedsim-overrides", "")))]
    overrides = parse_overrides(texts, "fedsim-overrides")
    if isinstance(config, str) and (config.lstrip().startswith("{") or "\n" in config):
        return apply_overrides(config, overrides, "fedsim-config", shared_fields), "fedsim-config"
    return runs.load(config, overrides)


def export(config: Source, folder: str | Path, overrides: tuple[str, ...] = ()) -> Path:
    """Write a Flower app for an experiment into a new folder, ready for `flwr run FOLDER`; returns the folder.

    Raises:
        ConfigError: if the experiment has a mistake, or the folder holds something.
    """
    raw, _ = _checked(config, overrides)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty; give a new folder")
    write_app(folder, raw)
    return folder


def num_clients(folder: Path, overrides: tuple[str, ...] = ()) -> int:
    """How many devices an exported experiment needs.

    Raises:
        ConfigError: if the experiment has a mistake, or the folder holds none.
    """
    if not (folder / EXPERIMENT).is_file():
        raise ConfigError(f"{folder} holds no {EXPERIMENT}; write it by fedsim flower export CONFIG {folder}")
    sys.path.insert(0, str(folder.absolute()))  # modules of the user's own lie there
    return _checked(folder / EXPERIMENT, overrides)[1]


def _checked(config: Source, overrides: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    """(content, number of clients) of an experiment that devices can run."""
    raw, source = experiment_of(config, {"fedsim-overrides": shlex.join(overrides)})
    composition = compose(apply_overrides(raw, DEPLOYED, source), source)
    composition.close()
    _refuse_attacks(composition)
    return raw, len(composition.experiment.task.num_examples)


def _refuse_attacks(composition: Composition) -> None:
    fleet = composition.experiment.fleet
    assert isinstance(fleet, SimFleet)
    if fleet.byzantine is not None:
        raise ConfigError(
            "clients.byzantine: attacks are simulated and see the honest clients' vectors; leave the section out of a "
            "deployment, or run `fedsim run`"
        )


@lru_cache(maxsize=2)
def _client(text: str, source: str) -> tuple[StackRunner, Book, Mapping[str, str]]:
    """What runs client halves, composed once a process."""
    raw = apply_overrides(json.loads(text), ON_CLIENT, source)
    composition = compose(raw, source)
    composition.close()
    executor, fleet = composition.executor, composition.experiment.fleet
    assert isinstance(executor, InProcess) and isinstance(fleet, SimFleet)
    return executor.runner, _book(executor.runner, fleet), _agreed(composition.experiment)


def _agreed(experiment: Experiment) -> dict[str, str]:
    """What both ends must have the same of; a device's data, samples and `runtime` are its own affair."""
    has = versions()
    file = {name: experiment.config.get(name) for name in ("seed", "strategy", "local", "uplink", "downlink")}
    # an optimizer's back end is one of the machine, which `auto` chose there
    file["local"] = {k: _without_backend(v) for k, v in (file["local"] or {}).items()}
    said = {"model": repr(experiment.task.layout)} | {k: json.dumps(v, sort_keys=True) for k, v in file.items()}
    hashes = {name: blake2b(text.encode(), digest_size=4).hexdigest() for name, text in said.items()}
    return {"fedsim": has["fedsim"], "torch": has["torch"].partition("+")[0], **hashes}


def _without_backend(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "backend"} if isinstance(value, Mapping) else value


def _book(runner: StackRunner, fleet: SimFleet) -> Book:
    links = {
        "uplink": None if runner.uplink is None else runner.uplink.compressor,
        "downlink": None if fleet.downlink is None else fleet.downlink.compressor,
    }
    return Book.of(runner.strategy, links)


def _patience(settings: Mapping[str, Any]) -> Patience:
    try:
        return Patience(reply_seconds=float(settings.get("fedsim-reply-seconds", Patience().reply_seconds)))
    except ValueError as e:
        raise ConfigError(f"fedsim-reply-seconds: {e}") from e


def _max_examples(settings: Mapping[str, Any]) -> int:
    most = settings.get("fedsim-max-examples", MAX_EXAMPLES)
    if type(most) is not int or not 0 < most <= 2**53:
        raise ConfigError(f"fedsim-max-examples: {most!r} is no number of samples; give 1 to 2**53")
    return most


server = server_app()
client = client_app()
