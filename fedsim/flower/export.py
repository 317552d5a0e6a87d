"""A folder that `flwr run` takes: two modules of a few lines, the experiment file, and a pyproject in Flower's form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "experiment"
EXPERIMENT = f"{PACKAGE}/experiment.yaml"

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedsim-experiment"
version = "1.0.0"
description = "A fedsim experiment on real devices."
license = { file = "LICENSE" }
# fedsim itself is installed beforehand at the server and on every device, like torch.
dependencies = ["flwr>=1.39,<1.43"]

[tool.hatch.build.targets.wheel]
packages = ["experiment"]

[tool.flwr.app]
publisher = "fedsim"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "experiment.server_app:app"
clientapp = "experiment.client_app:app"

# flwr run -c "fedsim-overrides='rounds=5 local.optimizer.lr=0.1' fedsim-out='/srv/run1'"
[tool.flwr.app.config]
fedsim-overrides = ""
fedsim-out = ""
fedsim-resume = false
fedsim-reply-seconds = 3600.0
fedsim-max-examples = 10000000
"""

LICENSE = """\
The licence of this experiment is for its author to choose; Flower only wants this file to exist.
"""

MODULE = '''\
"""The {side} of this experiment."""

from pathlib import Path

from fedsim.{module} import {side}_app

app = {side}_app(Path(__file__).with_name("experiment.yaml"))
'''


def write_app(folder: Path, raw: Mapping[str, Any]) -> None:
    """Write an app into a folder for an experiment file's content, overrides applied."""
    from omegaconf import OmegaConf

    package = folder / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    for side, module in (("server", "apps"), ("client", "warm")):
        (package / f"{side}_app.py").write_text(MODULE.format(side=side, module=module), encoding="utf-8")
    (folder / EXPERIMENT).write_text(OmegaConf.to_yaml(OmegaConf.create(dict(raw))), encoding="utf-8")
