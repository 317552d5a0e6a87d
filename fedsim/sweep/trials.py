"""One trial: a run in a folder of its own, and how it ended, in whichever process it runs.

Beside what every run leaves, its folder holds `trial.json`: what was asked for, and how it ended.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsim import results, runs
from fedsim.config import ConfigError, first_line
from fedsim.files import write_whole
from fedsim.loop import Interrupted, Watch
from fedsim.stop import Diverged
from fedsim.sweep.space import Setting

TRIAL_FILE = "trial.json"
ERROR_FILE = "error.txt"

Status = Literal["done", "diverged", "failed", "stopped"]


@dataclass(frozen=True)
class Job:
    """What a process needs to run a trial.

    Args:
        raw: the experiment file's content.
        source: its name, for messages.
        folder: of the run.
    """

    raw: dict[str, Any]
    source: str
    folder: Path

    def run(self, watch: Watch) -> Ended:
        """Run it, or go on with it from its newest checkpoint; nothing that a run may raise comes through."""
        started = time.perf_counter()

        def ended(status: Status, why: str = "") -> Ended:
            return Ended(status, why, time.perf_counter() - started)

        try:
            runs.execute(self.raw, self.source, self.folder, resume=results.holds_run(self.folder), watch=watch)
        except Diverged as e:
            return ended("diverged", str(e))
        except Interrupted as e:
            return Ended("stopped", str(e), code=e.exit_code)
        except Exception as e:
            write_whole(self.folder / ERROR_FILE, traceback.format_exc())
            return ended("failed", str(e) if isinstance(e, ConfigError) else first_line(e))
        (self.folder / ERROR_FILE).unlink(missing_ok=True)
        return ended("done")


@dataclass(frozen=True)
class Ended:
    """How a trial ended.

    Args:
        status: done, diverged, failed (and may be tried again) or stopped in the middle.
        why: in words.
        seconds: of this call.
        code: the exit code of a signal that stopped it.
    """

    status: Status
    why: str = ""
    seconds: float = 0.0
    code: int = 0


@dataclass(frozen=True)
class Trial:
    """A setting with a seed.

    Args:
        setting: what is tried.
        seed: None where the file's own is used.
        raw: the experiment file's content after overrides; source: its name.
        folder: of the run.
    """

    setting: Setting
    seed: int | None
    raw: dict[str, Any]
    source: str
    folder: Path

    def claim(self) -> None:
        """Refuse a folder that holds something else.

        Raises:
            ConfigError: if it holds a run, but not this trial's.
        """
        said = self._said()
        if said is None and results.holds_run(self.folder):
            raise ConfigError(f"{self.folder} holds a run of its own; give another --out")
        if said is not None and said["config"] != _plain(self.raw):
            raise ConfigError(f"{self.folder} holds a run of another sweep; give another --out")

    def begin(self) -> None:
        """Note in the folder whose it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.note(None)

    def note(self, ended: Ended | None) -> None:
        """Note in the folder how it ended."""
        said = {} if ended is None else {"status": ended.status, "why": ended.why, "seconds": ended.seconds}
        write_whole(self.folder / TRIAL_FILE, json.dumps({"config": self.raw, **said}, indent=1) + "\n")

    def before(self) -> Ended | None:
        """How it ended in an earlier call; None if it is still to be run or to be gone on with.

        A run that diverged would do so again; one that failed may not.
        """
        said = self._said() or {}
        if (self.folder / results.SUMMARY_FILE).exists():  # be it that `fedsim run --resume` completed it
            return Ended("done", seconds=said.get("seconds", 0.0))
        if said.get("status") == "diverged":
            return Ended("diverged", said["why"], said["seconds"])
        return None

    def final(self) -> dict[str, Any]:
        """The last value of every metric of a run that is done."""
        return dict(json.loads((self.folder / results.SUMMARY_FILE).read_text(encoding="utf-8"))["final"])

    def _said(self) -> dict[str, Any] | None:
        file = self.folder / TRIAL_FILE
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _plain(raw: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(raw))
