"""What `fedsim` and `fedsim COMMAND --help` say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedsim import __version__
from tests.fedsim.console import fedsim

SLOW = ("torch", "numpy", "pydantic", "omegaconf", "ray", "flwr", "matplotlib", "sklearn", "pandas")
HELP = """
import sys
from fedsim import cli

for args in (["--help"], ["run", "--help"], ["sweep", "--help"], ["--version"]):
    sys.argv = ["fedsim", *args]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code
assert not (found := {slow} & sys.modules.keys()), found
"""


def test_help_and_version_come_without_the_packages_that_take_seconds() -> None:
    found = subprocess.run([sys.executable, "-c", HELP.format(slow=set(SLOW))], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.count("Usage") == 3, found.stderr


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
