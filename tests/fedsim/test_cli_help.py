"""What `fedsim` and `fedsim COMMAND --help` say."""

from __future__ import annotations

import pytest

from tests.fedsim.console import fedsim


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
        ("list", ["TABLE is one of them"]),
        ("compare", ["FOLDERS are run folders"]),
        ("report", ["FOLDER is a run folder"]),
    ],
)
def test_the_help_says_what_every_argument_is(command: str, words: list[str]) -> None:
    found = fedsim(command, "--help")
    assert found.code == 0 and all(word in " ".join(found.out.split()) for word in words), found.out
