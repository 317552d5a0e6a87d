"""Arguments and options that commands have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OUT = ("--out", "-o")
Config = Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
