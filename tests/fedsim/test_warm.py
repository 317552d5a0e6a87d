"""A device's process that stays: it is a thread here, so that nothing has to be imported anew."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from fedsim import warm

IMPORTS = """
import sys
import fedsim.warm

assert "torch" not in sys.modules, "every message imports this"
import fedsim.apps

unused = {"ray", "matplotlib", "sklearn", "scipy", "pandas", "pyarrow", "networkx", "tensorboard", "torch._dynamo"}
assert not (found := (unused | {"fedsim.report", "fedsim.sweep"}) & sys.modules.keys()), found
"""
CONFIG = Path("app/experiment/experiment.yaml")
IDLE = 0.3


def answer(kind: str, content: RecordDict, context: Context) -> RecordDict:
    """Count messages in the context, and say how many there were."""
    if kind == "evaluate":
        raise LookupError("no data here")
    if kind == "query":
        raise SystemExit  # as if the process ended
    count = int(context.state["count"]["n"]) + 1 if "count" in context.state else 1
    context.state["count"] = ConfigRecord({"n": count})
    return RecordDict({"said": ConfigRecord({"n": count, "heard": content["heard"]["n"]})})


@pytest.fixture
def started(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What stays, by what started it; sockets lie in a folder of the test's own."""
    found: list[threading.Thread] = []

    def start(arguments: list[str], pass_fds: list[int]) -> None:
        server = socket.socket(fileno=os.dup(pass_fds[0]))

        def stay() -> None:
            with server, suppress(SystemExit):
                warm._stay(server, Path(arguments[4]), answer, IDLE)

        found.append(threading.Thread(target=stay))
        found[-1].start()

    monkeypatch.setattr("subprocess.Popen", start)
    folder = tmp_path_factory.mktemp("s")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    yield found
    for thread in found:
        thread.join()


def context(run: int = 1) -> Context:
    return Context(run, 5, {}, RecordDict(), {})


def ask(kind: str, of: Context, n: int = 0) -> RecordDict:
    return warm._ask(CONFIG, kind, RecordDict({"heard": ConfigRecord({"n": n})}), of)


def test_devices_import_only_what_they_use() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_messages_are_answered_by_one_that_stays_and_the_context_changes_here(started: list[Any]) -> None:
    mine = context()
    said = [dict(ask("train", mine, n)["said"]) for n in (7, 8)]
    assert said == [{"n": 1, "heard": 7}, {"n": 2, "heard": 8}] and mine.state["count"]["n"] == 2
    assert len(started) == 1


def test_every_run_has_one_of_its_own(started: list[Any]) -> None:
    for run in (1, 2):
        assert ask("train", context(run))["said"]["n"] == 1
    assert len(started) == 2


def test_an_error_is_said_and_the_next_message_answered(started: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="LookupError: no data here"):
        ask("evaluate", context())
    assert ask("train", context())["said"]["n"] == 1 and len(started) == 1


def test_nobody_stays_who_is_not_asked_and_another_takes_over(started: list[Any]) -> None:
    ask("train", context())
    started[0].join()
    assert list(warm._folder().iterdir()) == []
    assert ask("train", context())["said"]["n"] == 1 and len(started) == 2


def test_one_that_dies_at_work_is_named_and_replaced(started: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="has ended, perhaps for lack of memory"):
        ask("query", context())
    started[0].join()
    assert len(list(warm._folder().iterdir())) == 1, "its socket lies there still"
    assert ask("train", context())["said"]["n"] == 1 and len(started) == 2


def test_a_folder_that_others_may_enter_is_refused(started: list[Any]) -> None:
    warm._folder().chmod(0o755)
    with pytest.raises(RuntimeError, match="not a folder of this user alone; remove it, or set TMPDIR"):
        ask("train", context())
    assert not started
