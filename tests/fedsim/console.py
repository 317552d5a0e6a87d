"""The console script, called in this process."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from fedsim import cli


@dataclass(frozen=True)
class Outcome:
    """What a call left: exit code, and what it printed."""

    code: int
    out: str
    err: str


def fedsim(*args: object) -> Outcome:
    """`fedsim ARGS`, its exit code and output; an exception that the user would see as a traceback comes through."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["fedsim", *map(str, args)]),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.object(warnings, "showwarning", warnings.showwarning),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of every file below a folder, to see that nothing in it was touched."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
