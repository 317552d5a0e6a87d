"""What `fedsim` and `fedsim COMMAND --help` say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedsim import __version__
from tests.fedsim.console import fedsim

FRESH = """
import sys
from fedsim import cli

for args in {commands!r}:
    sys.argv = ["fedsim", *args]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code
assert not (found := {unused!r} & sys.modules.keys()), found
"""
UNUSED = {"ray", "flwr", "matplotlib", "sklearn", "scipy", "pandas", "pyarrow", "tensorboard"}


def test_help_and_version_come_without_the_packages_that_take_seconds() -> None:
    commands = [["--help"], ["run", "--help"], ["sweep", "--help"], ["flower", "deploy", "--help"], ["--version"]]
    found = _alone(commands, UNUSED | {"torch", "numpy", "pydantic", "omegaconf"})
    assert found.returncode == 0 and found.stdout.count("Usage") == 4, found.stderr


def test_a_run_and_its_report_load_only_what_they_use(tmp_path: Path) -> None:
    small = ["rounds=1", "clients.count=4", "strategy.cohort_size=2", "log.sinks=[jsonl]"]
    found = _alone([["run", "quickstart", *small, "--quiet", "--out", str(tmp_path / "run")]], UNUSED)
    assert found.returncode == 0 and (tmp_path / "run" / "report.html").exists(), found.stderr


def _alone(commands: list[list[str]], unused: set[str]) -> subprocess.CompletedProcess[str]:
    """The commands in a fresh process, which fails if one of the packages was imported there."""
    code = FRESH.format(commands=commands, unused=unused)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_version_is_shown() -> None:
    found = fedsim("--version")
    assert found.code == 0 and found.out == f"fedsim {__version__}\n"


def test_nothing_after_fedsim_shows_the_help_and_no_empty_error() -> None:
    found = fedsim()
    assert "Usage" in found.out and found.err == ""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", ["CONFIG is an experiment file", "OVERRIDES set keys", "runs/<config>-NNN"]),
        ("check", ["CONFIG is an experiment file", "OVERRIDES set keys"]),
        ("tune", ["CONFIG is an experiment file", "OVERRIDES set keys"]),
        ("sweep", ["CONFIG is an experiment file", "OVERRIDES are values to go through", "runs/<config>-sweep"]),
        ("list", ["TABLE is one of them", "fedsim list strategies fedfix"]),
        ("init", ["fedsim list strategies", "experiment.yaml"]),
        ("compare", ["FOLDERS are run folders"]),
        ("report", ["FOLDER is a run folder"]),
    ],
)
def test_the_help_says_what_every_argument_is(command: str, words: list[str]) -> None:
    found = fedsim(command, "--help")
    assert found.code == 0 and all(word in " ".join(found.out.split()) for word in words), found.out
