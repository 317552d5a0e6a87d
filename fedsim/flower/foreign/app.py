"""An app that is loaded: its two halves, its settings, and the call of its server."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedsim.config import ConfigError, at, first_line
from fedsim.flower.foreign import private
from fedsim.flower.foreign.grid import SimGrid
from fedsim.flower.foreign.nodes import seeded


@dataclass(frozen=True)
class App:
    """See the module's head.

    Args:
        folder: where it lies, an absolute path.
        client_reference: what its pyproject.toml says of its ClientApp.
        server, client: its two halves.
        run_config: its settings, flat.
    """

    folder: Path
    client_reference: str
    server: ServerApp
    client: ClientApp
    run_config: dict[str, Any]

    @classmethod
    def load(cls, folder: Path, overrides: dict[str, Any]) -> App:
        """Read an app's pyproject.toml and import what it names.

        Raises:
            ConfigError: if there is no app, a setting is not the app's, or it can't be imported.
        """
        with at("app"):
            try:
                named = private.components(folder)
            except FileNotFoundError as e:
                raise ConfigError(f"app: {folder} holds no pyproject.toml; give the folder of a Flower app") from e
        with at("run_config"):
            settings = private.run_config(folder, overrides)
        halves: dict[str, Any] = {}
        for name, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
            try:
                halves[name] = private.load(named[name], folder, kind)
            except (Exception, SystemExit) as e:
                what = f"{name} {named[name]} can't be loaded ({first_line(e)})"
                raise ConfigError(f"app: {what}; install what it needs, or correct its pyproject.toml") from e
        return cls(folder.resolve(), named["clientapp"], halves["serverapp"], halves["clientapp"], settings)

    @property
    def is_older(self) -> bool:
        """Whether its server is made of ServerAppComponents, and has no main function."""
        return private.is_older(self.server)

    def serve(self, grid: SimGrid, seed: int) -> None:
        """Call its server, as Flower does, with the generators that it draws from seeded; what it raises is raised."""
        context = Context(private.RUN_ID, private.SERVER_ID, {}, RecordDict(), dict(self.run_config))
        gc.freeze()  # Flower collects garbage for every list of arrays, and would look through all modules each time
        try:
            with seeded(seed, "flower server"), private.on_our_clock(grid, grid.wait_for_nodes):
                self.server(grid, context)
        finally:
            gc.unfreeze()
