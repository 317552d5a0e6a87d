"""A run into a folder that a terminal shows: what `fedsim run` and Flower's ServerApp call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedsim import results, runs
from fedsim.compose import Composition
from fedsim.fleet import DrivenFleet
from fedsim.history import History
from fedsim.progress import Progress
from fedsim.sim.place import follows


def run_shown(
    raw: Mapping[str, Any],
    source: str,
    out: Path | None,
    *,
    name: str,
    resume: bool,
    quiet: bool = False,
    fleet: Callable[[Composition], DrivenFleet] | None = None,
) -> History:
    """Run into a folder, by default the next of `runs/<name>-NNN`, and show how it goes; see `execute`."""
    stem, quiet = Path("runs") / name, quiet or follows()
    folder = out or (results.last_folder(stem) if resume and not follows() else stem)
    with Progress(quiet) as progress:
        history = runs.execute(
            raw,
            source,
            folder,
            numbered=out is None and not resume,
            resume=resume,
            watch=progress.watch,
            started=progress.start,
            fleet=fleet,
        )
    if history.path is not None:
        progress.summary(history)
    return history
